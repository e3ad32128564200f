"""Who may compute a stage, and when: single flight, admission on the cluster, leases, limits."""

import threading
import time

import pytest

from orchestrator.config import ExecutionConfig
from orchestrator.execution.cluster import TRIAL_BYTES, trajectories_at_a_time
from orchestrator.scheduling.admission import AdmissionController
from orchestrator.scheduling.coordinator import (
    LEASE_S,
    PATIENCE_S,
    PRESENT_S,
    SETTLE_S,
    Coordinator,
    LeaseReply,
    LeaseRequest,
)
from orchestrator.scheduling.leases import Leases, LimitReachedError
from orchestrator.scheduling.limits import Limits
from orchestrator.scheduling.packing import Node
from orchestrator.scheduling.resources import ResourceBundle, ResourceRequest, stage_resources
from orchestrator.storage.control import Directives

HELD = {
    "recover": ResourceRequest(ResourceBundle(1, 1), 4, 4),
    "score": ResourceRequest(ResourceBundle(1, 1), 2, 2),
    "evaluate": ResourceRequest(ResourceBundle(1, 1)),
}
FOUR_GPUS = AdmissionController(lambda: [Node("node", 100, 4)], HELD)


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_computes_and_the_other_waits() -> None:
    coordinator = Coordinator(Limits())
    first, second = (LeaseRequest("score", "key", holder) for holder in ("first", "second"))
    assert coordinator.try_acquire(first) == LeaseReply(True)
    assert coordinator.try_acquire(first) == LeaseReply(True)
    assert coordinator.try_acquire(second) == LeaseReply(False)
    assert coordinator.try_acquire(LeaseRequest("score", "other", "second")) == LeaseReply(True)
    coordinator.release(first, 1.0)
    assert coordinator.try_acquire(second) == LeaseReply(True)


def test_a_lease_lasts_as_long_as_its_holder_renews_it() -> None:
    clock = _Clock()
    coordinator = Coordinator(Limits(), clock=clock)
    first, second, third = (LeaseRequest("score", "key", holder) for holder in ("first", "second", "third"))
    coordinator.try_acquire(first)
    clock.now = LEASE_S - 1
    assert coordinator.renew([first]) == []
    clock.now = 2 * LEASE_S - 2
    assert not coordinator.try_acquire(second).granted
    clock.now = 2 * LEASE_S
    assert coordinator.try_acquire(second).granted
    # The first was only slow: what it gives back is no longer its own.
    coordinator.release(first, 1.0)
    assert not coordinator.try_acquire(third).granted


def test_limits_are_counted_over_all_trajectories_and_earlier_runs() -> None:
    limits = Limits(max_failures=2, budget=1.0, price_per_hour=3600.0, devices={"recover": 1.0})
    coordinator = Coordinator(limits, price=0.5, clock=_Clock())
    coordinator.fail("a")
    coordinator.fail("a")
    request = LeaseRequest("recover", "key", "x")
    assert coordinator.try_acquire(request).granted
    coordinator.release(request, 0.5)
    assert coordinator.try_acquire(request) == LeaseReply(False, "1.00 is spent (execution.budget: 1)")
    by_failures = Coordinator(limits)
    by_failures.fail("a")
    by_failures.fail("b")
    # A limit that is reached when all is done ends nothing.
    assert by_failures.ended_by() is None
    assert by_failures.try_acquire(request).limit == "2 trajectories failed (execution.max_failures: 2)"
    assert by_failures.ended_by() == "2 trajectories failed (execution.max_failures: 2)"


def test_stages_wait_for_admission_and_a_nearly_done_trajectory_goes_first() -> None:
    coordinator = Coordinator(Limits(), admission=FOUR_GPUS)
    training = LeaseRequest("recover", "a", "a", 5)
    assert coordinator.try_acquire(training).granted
    early, late = LeaseRequest("recover", "b", "b", 9), LeaseRequest("recover", "c", "c", 2)
    small = LeaseRequest("evaluate", "d", "d", 9)
    assert not any(coordinator.try_acquire(request).granted for request in (early, late, small))
    coordinator.release(training, 1.0)
    assert not coordinator.try_acquire(small).granted
    assert not coordinator.try_acquire(early).granted
    assert coordinator.try_acquire(late).granted
    coordinator.release(late, 1.0)
    assert not coordinator.try_acquire(small).granted
    assert coordinator.try_acquire(early).granted
    coordinator.release(early, 1.0)
    assert coordinator.try_acquire(small).granted
    assert coordinator.try_acquire(LeaseRequest("evaluate", "e", "e", 9)).granted
    assert coordinator.try_acquire(LeaseRequest("score", "f", "f", 9)).granted
    assert not coordinator.try_acquire(LeaseRequest("evaluate", "g", "g", 1)).granted
    # What is not said to hold anything needs no place.
    assert coordinator.try_acquire(LeaseRequest("report", "h", "h", 1)).granted


def test_a_stage_that_another_computes_keeps_no_place_in_the_queue() -> None:
    coordinator = Coordinator(Limits(), admission=FOUR_GPUS)
    assert coordinator.try_acquire(LeaseRequest("evaluate", "shared", "a", 9)).granted
    assert not coordinator.try_acquire(LeaseRequest("evaluate", "shared", "b", 1)).granted
    assert all(coordinator.try_acquire(LeaseRequest("evaluate", f"{i}", f"{i}", 9)).granted for i in range(3))


def test_a_request_that_is_not_repeated_expires() -> None:
    clock = _Clock()
    coordinator = Coordinator(Limits(), admission=FOUR_GPUS, clock=clock)
    at_work = LeaseRequest("evaluate", "a", "a")
    dead, waiting = (LeaseRequest("recover", name, name, left) for name, left in (("b", 1), ("c", 2)))
    assert coordinator.try_acquire(at_work).granted
    assert not coordinator.try_acquire(dead).granted
    assert not coordinator.try_acquire(waiting).granted
    clock.now = LEASE_S - 1
    coordinator.renew([at_work])
    assert not coordinator.try_acquire(waiting).granted
    clock.now = LEASE_S
    coordinator.release(at_work, 1.0)
    assert coordinator.try_acquire(waiting).granted


def test_a_request_whose_process_has_ended_gets_nothing() -> None:
    clock = _Clock()
    coordinator = Coordinator(Limits(), admission=FOUR_GPUS, clock=clock)
    at_work = LeaseRequest("recover", "a", "a")
    dead, waiting = (LeaseRequest("recover", name, name, left) for name, left in (("b", 1), ("c", 2)))
    assert [coordinator.try_acquire(each).granted for each in (at_work, dead, waiting)] == [
        True,
        False,
        False,
    ]
    clock.now = PRESENT_S + 1
    coordinator.release(at_work, 1.0)
    assert coordinator.try_acquire(waiting).granted


def test_a_stage_wider_than_the_cluster_waits_in_ray_and_holds_nothing() -> None:
    """Ray has to ask an autoscaler for the nodes; what is there goes on with other stages."""
    admission = AdmissionController(lambda: [Node("n", 8, 2)], HELD)
    coordinator = Coordinator(Limits(), admission=admission)
    assert coordinator.try_acquire(LeaseRequest("recover", "a", "a")).granted
    assert coordinator.try_acquire(LeaseRequest("evaluate", "b", "b")).granted


def test_a_cluster_that_grows_takes_more() -> None:
    clock, gpus = _Clock(), [1.0]
    admission = AdmissionController(lambda: [Node("n", 8, gpus[-1])], HELD)
    coordinator = Coordinator(Limits(), admission=admission, clock=clock)
    assert coordinator.try_acquire(LeaseRequest("evaluate", "a", "a")).granted
    assert not coordinator.try_acquire(LeaseRequest("evaluate", "b", "b")).granted
    gpus.append(2)
    clock.now = 1.0
    assert coordinator.try_acquire(LeaseRequest("evaluate", "b", "b")).granted


def test_a_pool_begins_with_what_there_is() -> None:
    one = ResourceBundle(1, 1)
    pool = HELD | {"score": ResourceRequest(one, 1, 8), "recover": ResourceRequest(one, 2, 2)}
    coordinator = Coordinator(Limits(), admission=AdmissionController(lambda: [Node("n", 100, 4)], pool))
    training, evaluation = LeaseRequest("recover", "a", "a", 5), LeaseRequest("evaluate", "c", "c", 5)
    assert coordinator.try_acquire(training).granted
    assert coordinator.try_acquire(LeaseRequest("score", "b", "b", 5)).granted
    # It holds the other two GPUs now, and takes those of the training when that ends.
    assert not coordinator.try_acquire(evaluation).granted
    coordinator.release(training, 1.0)
    assert not coordinator.try_acquire(evaluation).granted
    coordinator.release(LeaseRequest("score", "b", "b", 5), 1.0)
    assert coordinator.try_acquire(evaluation).granted


def test_a_small_stage_passes_a_wide_one_but_not_for_ever() -> None:
    clock = _Clock()
    coordinator = Coordinator(Limits(), admission=FOUR_GPUS, clock=clock)
    small = [LeaseRequest("evaluate", f"{i}", f"{i}", 9) for i in range(5)]
    wide = LeaseRequest("recover", "wide", "wide", 5)
    assert coordinator.try_acquire(small[0]).granted
    reply = coordinator.try_acquire(wide)
    assert (reply.granted, reply.waits_for) == (False, "4 x 1 GPU; free are 3 of 4 GPU on 1 node")
    clock.now = 1.0
    assert coordinator.try_acquire(small[1]).granted  # it fits, and passes
    for clock.now in range(2, 62, 10):
        coordinator.renew(small[:2])
        assert not coordinator.try_acquire(wide).granted
    assert clock.now < 1 + PATIENCE_S
    assert coordinator.try_acquire(small[2]).granted
    clock.now = 1 + PATIENCE_S
    coordinator.renew(small[:3])
    assert not coordinator.try_acquire(wide).granted
    assert not coordinator.try_acquire(small[3]).granted
    for held in small[:3]:
        coordinator.release(held, 1.0)
        assert not coordinator.try_acquire(small[3]).granted
    assert coordinator.try_acquire(wide).granted


def test_what_waits_for_room_goes_on_when_others_leave() -> None:
    """Another driver holds the cluster: nothing of ours is admitted, and nothing fails."""
    clock, others = _Clock(), [4.0]
    admission = AdmissionController(lambda: [Node("n", 100, 4, others=(0, others[-1], 0))], HELD)
    coordinator = Coordinator(Limits(), admission=admission, clock=clock)
    request = LeaseRequest("score", "a", "a")
    for clock.now in range(0, 10_000, 5):
        assert not coordinator.try_acquire(request).granted
    assert coordinator.try_acquire(request).waits_for == "2 x 1 GPU; free are 0 of 4 GPU on 1 node"
    others.append(1.0)
    clock.now += 1
    assert coordinator.try_acquire(request).granted


def test_a_priority_goes_before_how_many_stages_are_left() -> None:
    wanted = Directives(priorities={"urgent": 1})
    coordinator = Coordinator(Limits(), admission=FOUR_GPUS, control=lambda: wanted)
    training, late, urgent = (
        LeaseRequest("recover", key, key, left, key) for key, left in (("a", 5), ("b", 1), ("urgent", 9))
    )
    assert coordinator.try_acquire(training).granted
    assert not coordinator.try_acquire(late).granted
    assert not coordinator.try_acquire(urgent).granted
    coordinator.release(training, 1.0)
    assert not coordinator.try_acquire(late).granted
    assert coordinator.try_acquire(urgent).granted


def test_a_coordinator_that_was_started_again_remembers() -> None:
    """Spending and failures are told to it, its clock goes on, and leases come back as they are renewed."""
    clock = _Clock()
    limits = Limits(max_failures=2, time_limit_s=100.0, budget=5.0)
    again = Coordinator(limits, 3.0, None, clock, failed=["a"], elapsed_s=80.0, settle_s=SETTLE_S)
    held, other = LeaseRequest("score", "key", "first"), LeaseRequest("score", "key", "second")
    new = LeaseRequest("score", "new", "third")
    assert not again.try_acquire(other).granted
    assert "started again" in again.try_acquire(new).waits_for
    assert again.renew([held]) == []
    clock.now = SETTLE_S
    # A plain new one would grant it: two would compute the same stage.
    assert not again.try_acquire(other).granted
    assert again.try_acquire(new).granted
    clock.now = 20.0
    assert again.try_acquire(new).limit == "100 s have passed (execution.time_limit_s: 100)"
    again.fail("b")
    assert again.try_acquire(new).limit == "2 trajectories failed (execution.max_failures: 2)"


def test_a_lease_that_another_has_taken_is_reported_to_its_holder() -> None:
    clock = _Clock()
    coordinator = Coordinator(Limits(), clock=clock)
    first, second = (LeaseRequest("score", "key", holder) for holder in ("first", "second"))
    assert coordinator.try_acquire(first).granted
    clock.now = LEASE_S
    assert coordinator.renew([first]) == []  # it has expired, but nobody wanted it
    clock.now = 2 * LEASE_S
    assert coordinator.try_acquire(second).granted
    assert coordinator.renew([first]) == ["key"]


def test_fractions_of_a_gpu_fill_it() -> None:
    coordinator = Coordinator(
        Limits(),
        admission=AdmissionController(
            lambda: [Node("n", 8, 1)], {"evaluate": ResourceRequest(ResourceBundle(0, 0.1))}
        ),
    )
    granted = [coordinator.try_acquire(LeaseRequest("evaluate", f"{i}", f"{i}")).granted for i in range(11)]
    assert granted == [True] * 10 + [False]


def test_who_waits_is_reported_at_once() -> None:
    coordinator = Coordinator(Limits(time_limit_s=60.0), clock=time.monotonic)
    first, second = Leases(coordinator), Leases(coordinator)
    first.acquire("score", "key")
    waiting = threading.Thread(target=second.acquire, args=("score", "key"))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    first.release("key", 1.0)
    waiting.join(0.3)
    assert not waiting.is_alive()


def test_a_limit_reaches_those_who_wait() -> None:
    coordinator = Coordinator(Limits(max_failures=1))
    first, second = Leases(coordinator), Leases(coordinator)
    first.acquire("score", "key")
    threading.Timer(0.2, coordinator.fail, ("other",)).start()
    with pytest.raises(LimitReachedError, match=r"1 trajectories failed .*; --resume continues"):
        second.acquire("score", "key")


def test_a_trajectory_holds_several_leases_and_releases_each() -> None:
    """As while an evaluation goes on in the background."""
    coordinator = Coordinator(Limits())
    ours = Leases(coordinator)
    ours.acquire("evaluate", "a")
    ours.acquire("recover", "b")
    ours.release("a", 1.0)
    assert coordinator.try_acquire(LeaseRequest("evaluate", "a", "another")).granted
    assert not coordinator.try_acquire(LeaseRequest("recover", "b", "another")).granted
    ours.release("b", 1.0)
    assert coordinator.try_acquire(LeaseRequest("recover", "b", "another")).granted


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
    nodes = [Node("n", 1000 if gpus else 1, gpus)]
    admission = AdmissionController(lambda: nodes, stage_resources(execution))
    keep_busy = admission.concurrent_trajectories(nodes)
    assert trajectories_at_a_time(execution, keep_busy, head_gb * 2 * TRIAL_BYTES) == expected
