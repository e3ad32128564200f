"""Who may compute a stage, and when: single flight, places on the cluster, leases, limits."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.config import ExecutionConfig
from orchestrator.execution.cluster import TRIAL_BYTES, trajectories_at_a_time
from orchestrator.scheduling.admission import Need, Places, Room, needs_of
from orchestrator.scheduling.coordinator import (
    LEASE_S,
    Answer,
    AskedClaims,
    Coordinator,
    LimitReachedError,
    Request,
)
from orchestrator.scheduling.limits import Limits

HELD = {"recover": Room(1, 4), "score": Room(1, 2), "evaluate": Room(1, 1)}
FOUR_GPUS = Places(lambda: Room(100, 4), {kind: Need(room, room) for kind, room in HELD.items()})


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _calls(coordinator: Coordinator) -> Callable[..., Any]:
    return lambda method, *arguments: getattr(coordinator, method)(*arguments)


def test_one_computes_and_the_other_waits() -> None:
    coordinator = Coordinator(Limits())
    first, second = (Request("score", "key", holder) for holder in ("first", "second"))
    assert coordinator.ask(first) == Answer(True)
    assert coordinator.ask(first) == Answer(True)
    assert coordinator.ask(second) == Answer(False)
    assert coordinator.ask(Request("score", "other", "second")) == Answer(True)
    coordinator.give_back(first, 1.0)
    assert coordinator.ask(second) == Answer(True)


def test_a_claim_lasts_as_long_as_its_holder_lives() -> None:
    clock = _Clock()
    coordinator = Coordinator(Limits(), clock=clock)
    first, second, third = (Request("score", "key", holder) for holder in ("first", "second", "third"))
    coordinator.ask(first)
    clock.now = LEASE_S - 1
    coordinator.renew("first")
    clock.now = 2 * LEASE_S - 2
    assert not coordinator.ask(second).granted
    clock.now = 2 * LEASE_S
    assert coordinator.ask(second).granted
    # The first was only slow: what it gives back is no longer its own.
    coordinator.give_back(first, 1.0)
    assert not coordinator.ask(third).granted


def test_limits_are_counted_over_all_trajectories_and_earlier_runs() -> None:
    limits = Limits(max_failures=2, budget=1.0, price_per_hour=3600.0, devices={"recover": 1.0})
    coordinator = Coordinator(limits, price=0.5, clock=_Clock())
    coordinator.fail("a")
    coordinator.fail("a")
    request = Request("recover", "key", "x")
    assert coordinator.ask(request).granted
    coordinator.give_back(request, 0.5)
    assert coordinator.ask(request) == Answer(False, "1.00 is spent (execution.budget: 1)")
    by_failures = Coordinator(limits)
    by_failures.fail("a")
    by_failures.fail("b")
    # A limit that is reached when all is done ends nothing.
    assert by_failures.ended_by() is None
    assert by_failures.ask(request).stop == "2 trajectories failed (execution.max_failures: 2)"
    assert by_failures.ended_by() == "2 trajectories failed (execution.max_failures: 2)"


def test_stages_wait_for_a_place_and_a_nearly_done_trajectory_goes_first() -> None:
    coordinator = Coordinator(Limits(), places=FOUR_GPUS)
    training = Request("recover", "a", "a", 5)
    assert coordinator.ask(training).granted
    early, late = Request("recover", "b", "b", 9), Request("recover", "c", "c", 2)
    small = Request("evaluate", "d", "d", 9)
    assert not any(coordinator.ask(request).granted for request in (early, late, small))
    coordinator.give_back(training, 1.0)
    # Nothing that would fit overtakes a wider stage whose turn it is, which would else wait for ever.
    assert not coordinator.ask(small).granted
    assert not coordinator.ask(early).granted
    assert coordinator.ask(late).granted
    coordinator.give_back(late, 1.0)
    assert not coordinator.ask(small).granted
    assert coordinator.ask(early).granted
    coordinator.give_back(early, 1.0)
    assert coordinator.ask(small).granted
    assert coordinator.ask(Request("evaluate", "e", "e", 9)).granted
    assert coordinator.ask(Request("score", "f", "f", 9)).granted
    assert not coordinator.ask(Request("evaluate", "g", "g", 1)).granted
    # What is not said to hold anything needs no place.
    assert coordinator.ask(Request("report", "h", "h", 1)).granted


def test_a_stage_that_another_computes_keeps_no_place_in_the_queue() -> None:
    coordinator = Coordinator(Limits(), places=FOUR_GPUS)
    assert coordinator.ask(Request("evaluate", "shared", "a", 9)).granted
    assert not coordinator.ask(Request("evaluate", "shared", "b", 1)).granted
    assert all(coordinator.ask(Request("evaluate", f"{i}", f"{i}", 9)).granted for i in range(3))


def test_who_has_died_waiting_is_forgotten() -> None:
    clock = _Clock()
    coordinator = Coordinator(Limits(), places=FOUR_GPUS, clock=clock)
    coordinator.ask(Request("evaluate", "a", "a"))
    assert not coordinator.ask(Request("recover", "dead", "dead", 1)).granted
    waiting = Request("evaluate", "b", "b", 2)
    assert not coordinator.ask(waiting).granted
    coordinator.renew("a")
    clock.now = LEASE_S
    coordinator.renew("a")
    assert coordinator.ask(waiting).granted


def test_a_stage_wider_than_the_cluster_runs_alone() -> None:
    coordinator = Coordinator(Limits(), places=Places(lambda: Room(8, 2), FOUR_GPUS.needs))
    request = Request("recover", "a", "a")
    assert coordinator.ask(request).granted
    assert not coordinator.ask(Request("evaluate", "b", "b")).granted
    coordinator.give_back(request, 1.0)
    assert coordinator.ask(Request("evaluate", "b", "b")).granted


def test_a_cluster_that_grows_takes_more() -> None:
    rooms = [Room(8, 1)]
    coordinator = Coordinator(Limits(), places=Places(lambda: rooms[-1], FOUR_GPUS.needs))
    assert coordinator.ask(Request("evaluate", "a", "a")).granted
    assert not coordinator.ask(Request("evaluate", "b", "b")).granted
    rooms.append(Room(8, 2))
    assert coordinator.ask(Request("evaluate", "b", "b")).granted


def test_a_pool_begins_with_what_there_is() -> None:
    pool = {**FOUR_GPUS.needs, "score": Need(Room(1, 1), Room(8, 8)), "recover": Need(Room(1, 2), Room(1, 2))}
    coordinator = Coordinator(Limits(), places=Places(lambda: Room(100, 4), pool))
    training, evaluation = Request("recover", "a", "a", 5), Request("evaluate", "c", "c", 5)
    assert coordinator.ask(training).granted
    assert coordinator.ask(Request("score", "b", "b", 5)).granted
    # It holds the other two GPUs now, and takes those of the training when that ends.
    assert not coordinator.ask(evaluation).granted
    coordinator.give_back(training, 1.0)
    assert not coordinator.ask(evaluation).granted
    coordinator.give_back(Request("score", "b", "b", 5), 1.0)
    assert coordinator.ask(evaluation).granted


def test_fractions_of_a_gpu_fill_it() -> None:
    coordinator = Coordinator(
        Limits(), places=Places(lambda: Room(8, 1), {"evaluate": Need(Room(0, 0.1), Room(0, 0.1))})
    )
    granted = [coordinator.ask(Request("evaluate", f"{i}", f"{i}")).granted for i in range(11)]
    assert granted == [True] * 10 + [False]


def test_who_waits_is_told_at_once() -> None:
    coordinator = Coordinator(Limits(time_limit_s=60.0), clock=time.monotonic)
    first, second = AskedClaims(_calls(coordinator)), AskedClaims(_calls(coordinator))
    first.take("score", "key")
    waiting = threading.Thread(target=second.take, args=("score", "key"))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    first.give_back("key", 1.0)
    waiting.join(0.3)
    assert not waiting.is_alive()


def test_a_limit_reaches_those_who_wait() -> None:
    coordinator = Coordinator(Limits(max_failures=1))
    first, second = AskedClaims(_calls(coordinator)), AskedClaims(_calls(coordinator))
    first.take("score", "key")
    threading.Timer(0.2, coordinator.fail, ("other",)).start()
    with pytest.raises(LimitReachedError, match=r"1 trajectories failed .*; --resume continues"):
        second.take("score", "key")


def test_a_trajectory_holds_several_claims_and_gives_back_each() -> None:
    """As while an evaluation goes on in the background."""
    coordinator = Coordinator(Limits())
    ours = AskedClaims(_calls(coordinator))
    ours.take("evaluate", "a")
    ours.take("recover", "b")
    ours.give_back("a", 1.0)
    assert coordinator.ask(Request("evaluate", "a", "another")).granted
    assert not coordinator.ask(Request("recover", "b", "another")).granted
    ours.give_back("b", 1.0)
    assert coordinator.ask(Request("recover", "b", "another")).granted


@pytest.mark.parametrize(
    ("asked", "gpus", "head_gb", "expected"),
    [(None, 64, 100, 64), (None, 64, 8, 8), (None, 2, 100, 2), (None, 0, 0.1, 1), (3, 64, 100, 3)],
)
def test_as_many_trajectories_as_keep_the_cluster_busy(
    asked: int | None, gpus: int, head_gb: float, expected: int
) -> None:
    execution = ExecutionConfig.model_validate(
        {
            "scoring": {"actors": 2, "gpus": 1},
            "training": {"workers": 4, "gpus": 1},
            "evaluation": {"gpus": 1},
            "max_concurrent_trajectories": asked,
        }
    )
    places = Places(lambda: Room(1000 if gpus else 1, gpus), needs_of(execution))
    assert trajectories_at_a_time(execution, places, head_gb * 2 * TRIAL_BYTES) == expected
