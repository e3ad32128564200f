"""The actors of a campaign that live on the head: its coordinator and its progress board.

The head outlives the workers, which may be spot machines. An actor that Ray has to start again there takes
what it must remember from the store, from the arguments it was made with, and from its clients.
"""

import logging
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import ray

from orchestrator.execution.cluster import HEAD
from orchestrator.execution.coordinator_client import RayCoordinatorClient
from orchestrator.execution.progress import ProgressBoard
from orchestrator.scheduling.admission import AdmissionController
from orchestrator.scheduling.coordinator import SETTLE_S, Coordinator
from orchestrator.scheduling.limits import Limits, spent_before
from orchestrator.storage.control import Directives
from orchestrator.storage.stage_store import Store
from orchestrator.storage.superseded import paid_rows
from orchestrator.storage.trajectory_status import failed_since
from orchestrator.storage.usage import usage_before, usage_since, write_usage

log = logging.getLogger(__name__)

USAGE_S = 60.0
"""How often the coordinator writes what has been used of the cluster."""

ON_HEAD: dict[str, Any] = {
    "num_cpus": 0,
    "resources": {HEAD: 0.001},
    "max_restarts": -1,
    "max_task_retries": -1,
    "scheduling_strategy": "DEFAULT",
}


def start_board(campaign: str) -> Any:
    """Start the board that trajectories report to; return its handle."""
    return ray.remote(**ON_HEAD)(ProgressBoard).options(name=_name(f"progress of {campaign}")).remote()


def start_coordinator(
    limits: Limits,
    admission: AdmissionController | None,
    store: Store,
    at_a_time: int,
    control: Callable[[], Directives] = Directives,
    campaign: str | None = None,
) -> RayCoordinatorClient:
    """Start the coordinator of a campaign with so many trajectories at a time."""
    # A trajectory may wait for two stages, renew its leases and look for its cancellation at a time.
    many = {"max_concurrency": 4 * at_a_time + 8}
    remote = ray.remote(**ON_HEAD, **many)(HeadCoordinator)
    named = remote.options(name=_name(f"coordinator of {campaign or store.uri}"))
    actor = named.remote(limits, admission, store, time.time(), control)
    return RayCoordinatorClient(actor)


def _name(words: str) -> str:
    """Return a name for Ray's dashboard; no two actors of a namespace may have the same."""
    return f"{words} ({uuid4().hex[:6]})"


class HeadCoordinator(Coordinator):
    """A coordinator that knows after a restart what was spent and has failed since the campaign's start.

    `started_at` is the time of that start. Leases that are held come back as they are renewed.
    """

    def __init__(
        self,
        limits: Limits,
        admission: AdmissionController | None,
        store: Store,
        started_at: float,
        control: Callable[[], Directives] = Directives,
    ):
        with warnings.catch_warnings():  # Ray warns of a call that it makes itself
            warnings.simplefilter("ignore")
            again = ray.get_runtime_context().was_current_actor_reconstructed
        usage = usage_since(store, started_at)
        failed_s = usage.failed_s + usage_before(store, started_at).failed_s
        super().__init__(
            limits,
            spent_before(paid_rows(store), limits) + limits.price_of(failed_s),
            admission,
            failed=failed_since(store, started_at),
            elapsed_s=time.time() - started_at,
            settle_s=SETTLE_S if again else 0.0,
            usage=usage,
            control=control,
        )
        self._store, self._started_at = store, started_at
        self._counted_at, self._saving = time.monotonic(), threading.Lock()
        threading.Thread(target=self._keep_usage, name="usage", daemon=True).start()

    def save_usage(self) -> None:
        """Write to the store what has been used of the cluster since the campaign's start."""
        with self._saving:
            now = time.monotonic()
            usage = self.count_nodes(now - self._counted_at)
            self._counted_at = now
            write_usage(self._store, self._started_at, usage)

    def _keep_usage(self) -> None:
        while True:
            time.sleep(USAGE_S)
            try:
                self.save_usage()
            except Exception as error:  # the storage may be away for a moment
                log.warning("what was used of the cluster could not be written, trying again: %s", error)
