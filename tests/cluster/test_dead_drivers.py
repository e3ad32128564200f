"""What a killed driver leaves on the cluster, besides what Ray itself takes away."""

import subprocess
import sys
import time

import ray

from orchestrator.execution.cluster import NAMESPACE, end_helpers_of_dead_drivers

DRIVER = """
import os, sys, ray
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner

ray.init(address=sys.argv[1], namespace=sys.argv[2], log_to_driver=False)
helper = ray.remote(num_cpus=0)(PlacementGroupCleaner).options(name="left", lifetime="detached")
ray.get(helper.remote("controller", 1.0, 1.0, None).__ray_ready__.remote())
os._exit(0)
"""


def _alive() -> int:
    actors = ray._private.state.actors().values()
    helpers = [actor for actor in actors if actor["ActorClassName"] == "PlacementGroupCleaner"]
    return sum(helper["State"] == "ALIVE" for helper in helpers)


def test_a_helper_of_ray_train_that_was_never_reported_what_to_watch_is_ended(ray_two_cpus: None) -> None:
    address = ray.get_runtime_context().gcs_address
    for namespace in (f"{NAMESPACE}1", "another user's"):
        subprocess.run([sys.executable, "-c", DRIVER, address, namespace], check=True, timeout=120)
    deadline = time.monotonic() + 60
    while not all(job["IsDead"] for job in ray._private.state.jobs()[1:]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _alive() == 2
    end_helpers_of_dead_drivers()
    while _alive() != 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _alive() == 1
    ray.kill(ray.get_actor("left", "another user's"))
