"""Two campaigns of two drivers that share a cluster: lack of room is never a failure."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.nodes import environment

STARTING_S = 15.0
"""What the start of a stage's processes and of the trials takes at most here, while a CPU is held or free."""


@pytest.mark.long
def test_two_drivers_share_two_cpus(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.cluster.share_a_cluster", str(tmp_path)]
    surroundings = {**os.environ, **environment(tmp_path)}
    surroundings.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=900)
    said = done.stdout
    print(said)
    assert "coordinators and boards: head head head head" in said, said + done.stderr
    for driver in ("first", "second"):
        assert f'{{"driver": "{driver}", "failures": {{}}}}' in said
        # Ten stages each: one that both trajectories share is computed once.
        assert len(re.findall(rf"^{driver} .* s  ", said, re.MULTILINE)) >= 10
    assert float(re.findall(r"idle for ([\d.]+) s", said)[0]) < STARTING_S, said
