"""What an operator sees of a run on Ray, and does to it while it goes on."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.config import CampaignConfig, parse_config
from orchestrator.execution.campaign import limits_of
from orchestrator.execution.tune import CampaignOutcome, run_trials
from orchestrator.planning.planner import build_plan
from orchestrator.storage.control import Control, read_control, write_control
from orchestrator.storage.run_progress import TrajectoryProgress, read_progress
from orchestrator.storage.stage_logs import read_log
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import read_statuses
from tests.support.simulated import Simulation
from tests.support.tiny_campaign import tiny_campaign

FIRST, SECOND = "llama--first--seed0", "llama--second--seed0"
LONG_S = 300.0


PROGRAM = """
import logging, os, sys, time
import ray
from actors.contracts import ActorPoolSpec
from actors.ray_pool import ActorPool, run_in_task
from actors.stage_output import RunningStage, at_work_on
from orchestrator.execution.cluster import workers_output_to
from orchestrator.storage.stage_logs import LogWriter, WorkerOutput, read_log
from orchestrator.storage.stage_store import Store

stage, store = RunningStage("score of a", "a/003-score-0123456789ab.log"), Store(sys.argv[1])

class Talker:
    def __init__(self):
        print("being made")

    def work(self, shard):
        print(f"working on {shard}")
        logging.getLogger("actors.test").info("logged for %d", shard)
        return repr(self), ray.get_runtime_context().get_task_name()

def talk(progress):
    print("a task talks")
    return ray.get_runtime_context().get_task_name()

ray.init(address="local", num_cpus=2, include_dashboard=False)
with workers_output_to(WorkerOutput(LogWriter(store))):
    with at_work_on(stage):
        assert run_in_task(talk) == stage.name
        with ActorPool(ActorPoolSpec(1, 0.5, 0.0), Talker, setting="scoring") as pool:
            assert dict(pool.dispatch(range(2))) == dict.fromkeys(range(2), (stage.name, stage.name))
    assert run_in_task(talk) == "talk"  # of no stage, perhaps in the same process
    deadline = time.monotonic() + 30
    while b"a task talks" not in read_log(store, "workers.log") and time.monotonic() < deadline:
        time.sleep(0.2)
ray.shutdown()
"""


def test_names_in_the_dashboard_and_logs_say_which_stage(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    environment = {**os.environ, "RAY_memory_monitor_refresh_ms": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    store = Store(str(tmp_path))
    stage, workers = (
        [line.split(") ", 1)[-1] for line in read_log(store, name).decode().splitlines()]
        for name in ("a/003-score-0123456789ab.log", "workers.log")
    )
    said = [line for line in stage if "actors.test" not in line]
    assert sorted(said) == ["a task talks", "being made", "working on 0", "working on 1"]
    assert sum("logged for" in line for line in stage) == 2
    assert workers == ["a task talks"]


def _campaign(tmp_path: Path) -> tuple[CampaignConfig, Store]:
    campaign = tiny_campaign(tmp_path)
    method = campaign["methods"][0]
    campaign["methods"] = [
        {**method, "name": name, "recovery": {**method["recovery"], "learning_rate": rate}}
        for name, rate in (("first", 0.1), ("second", 0.2))
    ]
    campaign["execution"] |= {"backend": "ray"}
    campaign["storage"]["path"] = str(tmp_path / "runs")
    config = parse_config(campaign, "campaign.yaml")
    return config, Store.of_campaign(config.storage.path, config.name)


def _until(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _shown(store: Store) -> dict[str, TrajectoryProgress]:
    saved = read_progress(store)
    shown = saved.trajectories if saved else ()
    return {each.trajectory: each for each in shown if not each.background}


def _both_recover(store: Store) -> bool:
    shown = _shown(store).values()
    return [each.stage for each in shown if not each.waits_for] == ["recover", "recover"]


def _run(config: CampaignConfig, store: Store, notes: Path, recover_s: float = 0.1) -> CampaignOutcome:
    notes.mkdir(exist_ok=True)
    seconds = {"score": 0.1, "recover": recover_s, "evaluate": 0.1, "export": 0.0}
    simulation = Simulation(seconds, notes)
    return run_trials(config, build_plan(config), store, limits_of(config), 2, make_backend=simulation)


def test_a_stage_that_runs_ends_with_its_trajectory(ray_two_cpus: None, tmp_path: Path) -> None:
    config, store = _campaign(tmp_path)
    notes = tmp_path / "notes"

    def operate() -> None:
        _until(lambda: _both_recover(store))
        write_control(store, read_control(store).cancelling([FIRST]))
        _until(lambda: _shown(store)[FIRST].stage == "cancelled")
        assert _shown(store)[SECOND].stage == "recover"
        write_control(store, read_control(store).cancelling([SECOND]))

    operator = threading.Thread(target=operate)
    operator.start()
    started = time.monotonic()
    outcome = _run(config, store, notes, recover_s=LONG_S)
    operator.join()
    assert time.monotonic() - started < LONG_S / 2
    assert (outcome.failures, set(outcome.cancelled)) == ({}, {FIRST, SECOND})
    states = {name: each.state for name, each in read_statuses(store).items()}
    assert states == {FIRST: "cancelled", SECOND: "cancelled"}
    assert not list(notes.glob("recover-*.txt"))
    # Neither is run again by the next start.
    assert _run(config, store, notes) == CampaignOutcome({})


def test_a_paused_run_waits_and_goes_on(ray_two_cpus: None, tmp_path: Path) -> None:
    config, store = _campaign(tmp_path)
    notes = tmp_path / "notes"
    write_control(store, Control(paused=True))
    waited: list[str] = []

    def operate() -> None:
        _until(lambda: _shown(store) and all(each.waits_for for each in _shown(store).values()))
        waited.extend(each.waits_for for each in _shown(store).values())
        time.sleep(2)
        assert not list(notes.glob("*.txt"))
        write_control(store, Control())

    operator = threading.Thread(target=operate)
    operator.start()
    outcome = _run(config, store, notes)
    operator.join()
    assert outcome == CampaignOutcome({})
    assert set(waited) == {"the run is paused; `iterabre continue` goes on"}
