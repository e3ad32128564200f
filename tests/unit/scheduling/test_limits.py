"""When a campaign ends early, and what goes first."""

import pytest

from orchestrator.config import ExecutionConfig
from orchestrator.scheduling.limits import Limits, Spent, backoff_s, limit_reached, start_order
from orchestrator.scheduling.resources import CLOSED_FORM, MERGE_SCORING, TASK_SCORING, devices_held

ALL = Limits(max_failures=2, time_limit_s=100.0, budget=5.0)


@pytest.mark.parametrize(
    ("spent", "reason"),
    [
        (Spent(1, 99.9, 4.99), None),
        (Spent(failures=2), "2 trajectories failed (execution.max_failures: 2)"),
        (Spent(seconds=100.0), "100 s have passed (execution.time_limit_s: 100)"),
        (Spent(price=5.5), "5.50 is spent (execution.budget: 5)"),
    ],
)
def test_each_limit_ends_the_campaign(spent: Spent, reason: str | None) -> None:
    assert limit_reached(ALL, spent) == reason
    assert limit_reached(Limits(), spent) is None


def test_a_stage_costs_its_devices() -> None:
    execution = ExecutionConfig.model_validate(
        {"scoring": {"actors": 4, "gpus": 0.5}, "training": {"workers": 2, "gpus": 1.0}}
    )
    limits = Limits(price_per_hour=3.0, devices=devices_held(execution))
    assert limits.devices == {
        "score": 2.0, MERGE_SCORING: 0.5, TASK_SCORING: 0.0, "generate": 0.0, "teach": 2.0, "recover": 2.0,
        CLOSED_FORM: 1.0, "evaluate": 0.0, "export": 0.0,
    }  # fmt: skip
    assert limits.price("recover", 1800) == 3.0
    assert limits.price("prune", 1800) == 0
    on_cpus = ExecutionConfig.model_validate({"training": {"workers": 3, "cpus": 2.0}})
    assert devices_held(on_cpus)["recover"] == 6


def test_a_nearly_done_trajectory_starts_first_unless_another_has_priority() -> None:
    remaining = {"a": 9, "b": 2, "c": 9, "d": 0}
    assert list(start_order(remaining, {})) == ["d", "b", "a", "c"]
    assert list(start_order(remaining, {"c": 2, "a": 2, "d": -1})) == ["a", "c", "b", "d"]


def test_pauses_grow_and_end() -> None:
    assert [backoff_s(attempt) for attempt in (0, 1, 2, 3, 20)] == [5, 10, 20, 40, 300]
