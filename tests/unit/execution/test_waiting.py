"""The seconds of a stage are those at work: what it waited for room is a number of its own."""

import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from actors.contracts import ClusterProgress, Progress, WaitingTime, no_progress, on_cluster
from orchestrator.config import parse_config
from orchestrator.execution.progress import StageProgress, TrajectoryProgress
from orchestrator.planning.planner import build_plan
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.stage_store import Store
from tests.support.simulated import SimulatedBackend, Simulation
from tests.support.tiny_campaign import resolver_of_one, tiny_campaign

WAITED_S = 0.4


class _Waiting(SimulatedBackend):
    """Waits for room before each stage, and says so where that is taken note of."""

    def _work(self, kind: str, spec: Any, progress: Progress = no_progress) -> None:
        if isinstance(progress, ClusterProgress):
            progress.waits_for("1 GPU on one node; free are 0 of 4 GPU")
        time.sleep(WAITED_S)
        if hasattr(progress, "waited"):
            progress.waited(WAITED_S)
        super()._work(kind, spec)


def test_waiting_for_room_is_not_in_the_seconds_of_a_stage(tmp_path: Path) -> None:
    from orchestrator.execution.stage_runner import StageRunner

    (trajectory,) = build_plan(parse_config(tiny_campaign(tmp_path), "campaign.yaml")).trajectories
    store, shown = Store(str(tmp_path / "run")), []
    backend = _Waiting(Simulation(dict.fromkeys(("score", "evaluate"), 0.1), tmp_path))
    stages = StageRunner(trajectory, resolver_of_one(trajectory, store, backend, shown.append))
    stages.score(trajectory.iterations[0], trajectory.dense)
    rows = {row["metric"]: row["value"] for row in Ledger(store.ledger_uri).read().to_pylist()}
    assert rows["seconds"] == pytest.approx(0.1, abs=0.1)
    assert rows["waited_s"] == pytest.approx(WAITED_S)
    assert "1 GPU on one node; free are 0 of 4 GPU" in {progress.waits_for for progress in shown}


def test_waiting_in_another_process_adds_up_in_a_copy() -> None:
    stage = StageProgress(_ignore, TrajectoryProgress("a", 0, 1, "score"))
    copy = WaitingTime(pickle.loads(pickle.dumps(stage)))
    for seconds in (1.0, 2.0):
        copy.waited(seconds)
    assert (copy.waited_s, stage.waited_s) == (3.0, 0.0)


def test_a_plain_function_is_a_progress_on_a_cluster_too() -> None:
    counted: list[tuple[int, int, str]] = []
    progress = on_cluster(lambda done, total, note="": counted.append((done, total, note)))
    progress.waits_for("room")
    progress.runs_on(["host"])
    progress.waited(1.0)
    progress(1, 2, "shards")
    assert counted == [(1, 2, "shards")]


def _ignore(progress: TrajectoryProgress) -> None:
    pass
