"""Cancelled trajectories, pauses and priorities, as the coordinator keeps to them."""

import pytest

from orchestrator.scheduling.coordinator import (
    PAUSED,
    Coordinator,
    LeaseReply,
    LeaseRequest,
)
from orchestrator.scheduling.leases import Leases, TrajectoryCancelledError
from orchestrator.scheduling.limits import Limits
from orchestrator.storage.control import Directives


class _Operator:
    wants = Directives()

    def __call__(self) -> Directives:
        return self.wants


def _request(trajectory: str, key: str = "", stages_left: int = 0) -> LeaseRequest:
    return LeaseRequest("score", key or trajectory, f"process of {trajectory}", stages_left, trajectory)


def test_nothing_starts_while_a_run_is_paused_and_what_runs_goes_on() -> None:
    operator = _Operator()
    coordinator = Coordinator(Limits(), control=operator)
    assert coordinator.try_acquire(_request("a")).granted
    operator.wants = Directives(paused=True)
    refused = coordinator.try_acquire(_request("b"))
    assert (refused.granted, refused.limit, refused.waits_for) == (False, None, PAUSED)
    assert coordinator.try_acquire(_request("a")).granted  # held already
    coordinator.release(_request("a"), 1.0)
    operator.wants = Directives()
    assert coordinator.try_acquire(_request("b")).granted


def test_a_cancelled_trajectory_gets_nothing_and_keeps_nothing() -> None:
    operator = _Operator()
    coordinator = Coordinator(Limits(), control=operator)
    coordinator.try_acquire(_request("a", "shared"))
    assert not coordinator.try_acquire(_request("b", "shared")).granted
    operator.wants = Directives(cancelled={"a"})
    assert coordinator.is_cancelled("a")
    assert not coordinator.is_cancelled("b")
    assert coordinator.try_acquire(_request("b", "shared")).granted
    assert coordinator.try_acquire(_request("a", "other")) == LeaseReply(False, cancelled=True)
    with pytest.raises(TrajectoryCancelledError, match="a was cancelled"):
        Leases(coordinator, "a").acquire("score", "other")


def test_a_trajectory_learns_what_it_waits_for() -> None:
    operator = _Operator()
    coordinator = Coordinator(Limits(), control=operator)
    operator.wants = Directives(paused=True)
    heard: list[str] = []

    def hear(reason: str) -> None:
        heard.append(reason)
        operator.wants = Directives()

    leases = Leases(coordinator, "a")
    leases.acquire("score", "key", 0, hear)
    leases.release("key", 1.0)
    assert heard == [PAUSED, ""]
