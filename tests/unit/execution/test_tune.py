"""What the process of a trial loads; there is one on the head for every trajectory under way."""

import pickle
import subprocess
import sys
from pathlib import Path

from orchestrator.config import parse_config
from orchestrator.planning.planner import build_plan
from tests.support.tiny_campaign import tiny_campaign

PROGRAM = """
import pickle, sys
from pathlib import Path

import actors.evaluation.ray, actors.generation.ray, actors.recovery.ray, actors.scoring.ray
import orchestrator.execution.ray
import orchestrator.execution.tune
from orchestrator.scheduling.coordinator import Coordinator
from orchestrator.scheduling.limits import Limits
from orchestrator.storage.stage_store import Store
from orchestrator.execution.trial import run_trial
from tests.support.simulated import Simulation

place = Path(sys.argv[1])
trajectory = pickle.loads((place / "trajectory.pickle").read_bytes())
coordinator, store = Coordinator(Limits()), Store(str(place / "run"))
times = dict.fromkeys(("score", "recover", "evaluate", "export"), 0.0)
backend = Simulation(times, place)(None, None)
assert run_trial(trajectory, backend, store, lambda progress: None, coordinator) is None
assert len(list((place / "run/models").glob("*/*/config.json"))) == 2
heavy = ("torch", "transformers", "peft", "deepspeed", "lm_eval", "datasets", "gguf")
print("loaded:", *(name for name in heavy if name in sys.modules))
"""


def test_a_trial_loads_nothing_that_computes(tmp_path: Path) -> None:
    plan = build_plan(parse_config(tiny_campaign(tmp_path), "campaign.yaml"))
    (tmp_path / "trajectory.pickle").write_bytes(pickle.dumps(plan.trajectories[0]))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]
