"""How an operator's wishes reach the trajectories."""

import threading
import time
from pathlib import Path

from orchestrator.config import parse_config
from orchestrator.execution.control import control_reader, watching_for_cancellation
from orchestrator.planning.planner import build_plan
from orchestrator.storage.control import Control, write_control
from orchestrator.storage.stage_store import Store
from tests.support.tiny_campaign import tiny_campaign


def test_priorities_come_from_methods_and_models(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    method = campaign["methods"][0]
    campaign["methods"] = [{**method, "name": "a", "priority": 2}, {**method, "name": "b"}]
    campaign["models"][0]["priority"] = 10
    config = parse_config(campaign, "campaign.yaml")
    store = Store(str(tmp_path / "run"))
    plan = build_plan(config)
    assert control_reader(config, plan, store)().priorities == {
        "llama--a--seed0": 12,
        "llama--b--seed0": 10,
    }
    write_control(store, Control().prioritising(["b"], [], 5).cancelling(["llama--a--seed0"]))
    wanted = control_reader(config, plan, store)()
    assert wanted.priorities["llama--b--seed0"] == 15
    assert wanted.cancelled == {"llama--a--seed0"}


def test_a_cancelled_trajectory_is_ended_while_it_computes() -> None:
    asked, ended = [], threading.Event()

    def is_cancelled() -> bool:
        asked.append(True)
        if len(asked) == 1:
            raise ConnectionError("the coordinator is being restarted")
        return len(asked) > 2

    with watching_for_cancellation(is_cancelled, ended.set, interval_s=0.01):
        assert ended.wait(10)


def test_what_has_finished_is_not_ended() -> None:
    ended = threading.Event()
    with watching_for_cancellation(lambda: True, ended.set, interval_s=0.2):
        pass
    time.sleep(0.4)
    assert not ended.is_set()
