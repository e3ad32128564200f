"""What a killed driver leaves on the cluster, besides what Ray itself takes away."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from orchestrator.execution.cluster import OUR_DRIVER, end_helpers_of_dead_drivers

DRIVER = """
import os, sys, ray
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner

ray.init(address=sys.argv[1], log_to_driver=False)
helper = ray.remote(num_cpus=0)(PlacementGroupCleaner).options(lifetime="detached")
ray.get(helper.remote("controller", 1.0, 1.0, None).__ray_ready__.remote())
os._exit(0)
"""


def _helpers() -> list[str]:
    actors = ray._private.state.actors().values()
    return sorted(a["State"] for a in actors if a["ActorClassName"] == "PlacementGroupCleaner")


def test_a_helper_that_waits_for_ever_is_ended_if_a_campaign_left_it(
    ray_two_cpus: None, tmp_path: Path
) -> None:
    address = ray.get_runtime_context().gcs_address
    for name in ("iterabre", "another_users_training"):
        (tmp_path / name).write_text(DRIVER)
        subprocess.run([sys.executable, tmp_path / name, address], check=True, timeout=120)
    deadline = time.monotonic() + 60
    while not all(job["IsDead"] for job in ray._private.state.jobs()[1:]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _helpers() == ["ALIVE", "ALIVE"]
    end_helpers_of_dead_drivers()
    while "DEAD" not in _helpers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _helpers() == ["ALIVE", "DEAD"]


@pytest.mark.parametrize(
    ("entrypoint", "ours"),
    [
        ("/opt/venv/bin/python /opt/venv/bin/iterabre campaign c.yaml --resume", True),
        ("iterabre compress c.yaml", True),
        ("python -m orchestrator.cli campaign c.yaml", True),
        ("python /srv/orchestrator/cli/__main__.py campaign c.yaml", True),
        ("python train.py --data /data/iterabre/texts", False),
        ("python -m someones_iterabre", False),
        ("", False),
    ],
)
def test_the_drivers_of_campaigns_are_known_by_their_command(entrypoint: str, ours: bool) -> None:
    assert bool(OUR_DRIVER.search(entrypoint)) == ours
