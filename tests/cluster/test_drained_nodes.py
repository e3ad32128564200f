"""A campaign on machines that are taken away after a notice, as spot machines are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.chaos.nodes import environment
from tests.cluster.test_campaign import assert_same, campaign, finish, start

STEPS, CHECKPOINT_STEPS = 1200, 300


def _campaign(directory: Path, name: str, **execution: object) -> Path:
    """One recovery, long enough for a notice, and with few checkpoints of its own."""
    file = campaign(directory, name, **execution)
    config = yaml.safe_load(file.read_text())
    config["targets"] = [{"layers": 5}]
    config["methods"][0]["recovery"] |= {
        "max_tokens": 64 * STEPS,
        "checkpoint_steps": CHECKPOINT_STEPS,
    }
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.mark.long
def test_a_notice_leads_to_a_checkpoint_and_the_campaign_goes_on_elsewhere(tmp_path: Path) -> None:
    finish(start(_campaign(tmp_path, "undisturbed", backend="local")))
    file = _campaign(tmp_path, "drained")
    run = tmp_path / "runs/drained"
    surroundings = {**os.environ, **environment(tmp_path), "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
    surroundings.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "tests.cluster.drain_nodes", str(file), str(run)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=900)
    reported = done.stdout + done.stderr
    assert "exit code 0" in done.stdout, reported
    found = re.search(r"checkpoints ([\d ]+)", done.stdout)
    assert found, reported
    assert [steps for steps in map(int, found[1].split()) if steps % CHECKPOINT_STEPS], reported
    assert_same(run, tmp_path / "runs/undisturbed")
