"""A campaign on a cluster that has no worker when it begins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.nodes import environment
from tests.cluster.test_campaign import campaign


@pytest.mark.long
def test_a_cluster_grows_from_zero_for_a_campaign_and_shrinks_again(tmp_path: Path) -> None:
    file = campaign(tmp_path, "grow", cluster_maximum={"nodes": 2, "cpus": 1})
    command = [sys.executable, "-m", "tests.cluster.grow_from_zero", str(file)]
    surroundings = {**os.environ, **environment(tmp_path)}
    surroundings.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=900)
    assert "workers: 0 before, 2 at most, 0 after; exit code 0" in done.stdout, done.stdout + done.stderr
