"""What a run has used of the cluster, over all starts of its driver."""

from pathlib import Path

from orchestrator.scheduling.admission import AdmissionController
from orchestrator.scheduling.coordinator import Coordinator, LeaseRequest
from orchestrator.scheduling.limits import Limits
from orchestrator.scheduling.packing import Node
from orchestrator.storage.stage_store import Store
from orchestrator.storage.usage import (
    Usage,
    total_usage,
    usage_before,
    usage_since,
    write_usage,
)


def test_every_start_has_a_file_of_its_own(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert total_usage(store) == Usage()
    write_usage(store, 1.0, Usage(10, 5, 1))
    write_usage(store, 2.0, Usage(7, 7, 0))
    write_usage(store, 2.0, Usage(100, 50, 10))
    assert usage_since(store, 2.0) == Usage(100, 50, 10)
    assert usage_before(store, 2.0) == usage_since(store, 1.0) == Usage(10, 5, 1)
    assert total_usage(store) == Usage(110, 55, 11)
    assert usage_since(store, 3.0) == Usage()


def test_idle_nodes_and_failed_attempts_are_in_the_cost(tmp_path: Path) -> None:
    have = [Node("a", 8, 4, others=(0, 1, 0)), Node("b", 8, 4), Node("may start", 8, 4, is_up=False)]
    limits = Limits(devices={"recover": 4.0}, price_per_hour=2.0)
    coordinator = Coordinator(limits, admission=AdmissionController(lambda: have, {}))
    request = LeaseRequest("recover", "key", "a")
    coordinator.try_acquire(request)
    coordinator.release(request, 600.0, failed=True)
    coordinator.try_acquire(request)
    coordinator.release(request, 1800.0)
    usage = coordinator.count_nodes(3600.0)
    assert usage == Usage(up_s=7 * 3600, worked_s=4 * 1800, failed_s=4 * 600)
    assert usage.idle_s == 7 * 3600 - 4 * 2400
