"""When a campaign ends early, what goes first, and who may compute a stage."""

from typing import Any

import pytest

from orchestrator.config import ExecutionConfig
from orchestrator.coordinator import LEASE_S, Answer, AskedClaims, Coordinator, LimitReachedError
from orchestrator.limits import Limits, Spent, backoff_s, devices_held, limit_reached, start_order

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
        "score": 2.0, "generate": 0.0, "recover": 2.0, "evaluate": 0.0, "export": 0.0,
    }  # fmt: skip
    assert limits.price("recover", 1800) == 3.0
    assert limits.price("prune", 1800) == 0
    on_cpus = ExecutionConfig.model_validate({"training": {"workers": 3, "cpus": 2.0}})
    assert devices_held(on_cpus)["recover"] == 6


def test_a_nearly_done_trajectory_starts_first() -> None:
    assert list(start_order({"a": 9, "b": 2, "c": 9, "d": 0})) == ["d", "b", "a", "c"]


def test_pauses_grow_and_end() -> None:
    assert [backoff_s(attempt) for attempt in (0, 1, 2, 3, 20)] == [5, 10, 20, 40, 300]


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_computes_and_the_other_waits() -> None:
    coordinator = Coordinator(Limits())
    assert coordinator.ask("key", "first") == Answer(True)
    assert coordinator.ask("key", "second") == Answer(False)
    assert coordinator.ask("other", "second") == Answer(True)
    coordinator.give_back("score", "key", "first", 1.0)
    assert coordinator.ask("key", "second") == Answer(True)


def test_a_claim_lasts_as_long_as_its_holder_lives() -> None:
    clock = _Clock()
    coordinator = Coordinator(Limits(), clock=clock)
    coordinator.ask("key", "first")
    clock.now = LEASE_S - 1
    coordinator.renew("first")
    clock.now = 2 * LEASE_S - 2
    assert not coordinator.ask("key", "second").granted
    clock.now = 2 * LEASE_S
    assert coordinator.ask("key", "second").granted
    # The first was only slow: what it gives back is no longer its own.
    coordinator.give_back("score", "key", "first", 1.0)
    assert not coordinator.ask("key", "third").granted


def test_limits_are_counted_over_all_trajectories_and_earlier_runs() -> None:
    clock = _Clock()
    limits = Limits(max_failures=2, budget=1.0, price_per_hour=3600.0, devices={"recover": 1.0})
    coordinator = Coordinator(limits, price=0.5, clock=clock)
    coordinator.fail("a")
    coordinator.fail("a")
    assert coordinator.ask("key", "x").granted
    coordinator.give_back("recover", "key", "x", 0.5)
    assert coordinator.ask("key", "x") == Answer(False, "1.00 is spent (execution.budget: 1)")
    by_failures = Coordinator(limits)
    by_failures.fail("a")
    by_failures.fail("b")
    # A limit that is reached when all is done ends nothing.
    assert by_failures.ended_by() is None
    assert by_failures.ask("key", "x").stop == "2 trajectories failed (execution.max_failures: 2)"
    assert by_failures.ended_by() == "2 trajectories failed (execution.max_failures: 2)"


def test_claims_wait_until_the_other_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = Coordinator(Limits(time_limit_s=60.0), clock=(clock := _Clock()))

    def call(method: str, *arguments: object) -> object:
        return getattr(coordinator, method)(*arguments)

    first, second = AskedClaims(call), AskedClaims(call)
    first.take("score", "key")
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            first.give_back("score", "key", 1.0)

    monkeypatch.setattr("time.sleep", sleep)
    second.take("score", "key")
    assert len(slept) == 3
    second.give_back("score", "key", 0.0)
    clock.now = 61
    with pytest.raises(LimitReachedError, match=r"61 s have passed .*; --resume continues"):
        second.take("score", "key")


def test_a_trajectory_holds_several_claims_and_gives_back_each() -> None:
    """As while an evaluation goes on in the background."""
    coordinator = Coordinator(Limits())

    def call(method: str, *arguments: Any) -> Any:
        return getattr(coordinator, method)(*arguments)

    ours = AskedClaims(call)
    ours.take("evaluate", "a")
    ours.take("recover", "b")
    ours.give_back("evaluate", "a", 1.0)
    assert coordinator.ask("a", "another").granted
    assert not coordinator.ask("b", "another").granted
    ours.give_back("recover", "b", 1.0)
    assert coordinator.ask("b", "another").granted
