"""The leases of a trajectory's process: renewed whatever happens, and one thread at a time on a stage."""

import threading
import time
from collections.abc import Sequence

import pytest

from orchestrator.scheduling import leases as module
from orchestrator.scheduling.coordinator import Coordinator, LeaseRequest
from orchestrator.scheduling.leases import Leases
from orchestrator.scheduling.limits import Limits


class _Recording(Coordinator):
    """Takes note of renewals; the first `failing` of them do not arrive."""

    def __init__(self, failing: int = 0):
        super().__init__(Limits())
        self.failing, self.renewals = failing, 0

    def renew(self, held: Sequence[LeaseRequest]) -> Sequence[str]:
        self.renewals += 1
        if self.renewals <= self.failing:
            raise ConnectionError("the head was away for a moment")
        return super().renew(held)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEWAL_S", 0.05)
    monkeypatch.setattr(module, "RETRY_S", 0.01, raising=False)


def test_a_renewal_that_fails_is_tried_again() -> None:
    coordinator = _Recording(failing=3)
    ours = Leases(coordinator)
    ours.acquire("score", "key")
    time.sleep(0.5)
    assert coordinator.renewals > 5
    ours.release("key", 1.0)
    ended_at = coordinator.renewals
    time.sleep(0.2)
    assert coordinator.renewals <= ended_at + 1


def test_a_lost_lease_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    coordinator = _Recording()
    ours = Leases(coordinator)
    ours.acquire("score", "key")
    coordinator._granted["key"] = LeaseRequest("score", "key", "another")
    time.sleep(0.3)
    assert caplog.text.count("taken over by another trajectory") == 1
    ours.release("key", 1.0)


def test_two_threads_with_one_stage_compute_it_one_after_the_other() -> None:
    """As two evaluations in the background with the same key do, of which the first fails."""
    ours, at_work, most, errors = Leases(Coordinator(Limits())), [0], [0], []

    def compute() -> None:
        try:
            ours.acquire("evaluate", "key")
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
            time.sleep(0.1)
            at_work[0] -= 1
            ours.release("key", 0.1)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert (errors, most[0]) == ([], 1)


def test_what_a_stage_waits_for_is_passed_on() -> None:
    coordinator, said = Coordinator(Limits()), []
    first, second = Leases(coordinator), Leases(coordinator)
    first.acquire("score", "key")
    threading.Timer(0.2, first.release, ("key", 1.0)).start()
    module_wait, module.ACQUIRE_WAIT_S = module.ACQUIRE_WAIT_S, 0.05
    try:
        second.acquire("score", "key", waits_for=said.append)
    finally:
        module.ACQUIRE_WAIT_S = module_wait
    assert said == ["the same stage, which another trajectory computes", ""]
    second.release("key", 1.0)


def test_a_release_cannot_be_undone_by_a_renewal_under_way() -> None:
    coordinator = _Recording()
    for number in range(50):
        ours = Leases(coordinator)
        ours.acquire("score", f"{number}")
        time.sleep(0.002 * (number % 30))
        ours.release(f"{number}", 0.1)
    time.sleep(0.2)
    assert coordinator._granted == {}
