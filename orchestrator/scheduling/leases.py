"""The leases of one trajectory, as its process acquires, renews and releases them."""

import logging
import threading
import uuid
from collections.abc import Callable

from orchestrator.errors import WorkError
from orchestrator.scheduling.coordinator import RENEWAL_S, CoordinatorClient, LeaseRequest

log = logging.getLogger(__name__)

ACQUIRE_WAIT_S = 5.0
"""How long one call to the coordinator waits for a lease."""

RETRY_S = 1.0
"""Pause after a renewal that did not reach the coordinator."""


class LimitReachedError(WorkError):
    """A limit of the campaign is reached: this trajectory ends here and can be resumed."""


class TrajectoryCancelledError(WorkError):
    """An operator has cancelled this trajectory."""


class Leases:
    """The leases of one trajectory, acquired from a coordinator.

    It may hold several at a time: an evaluation in the background, and what goes on meanwhile. Two
    threads that need the same stage get its lease one after the other.
    """

    def __init__(self, coordinator: CoordinatorClient, trajectory: str = ""):
        self._coordinator = coordinator
        self._trajectory = trajectory
        self._holder = uuid.uuid4().hex
        self._wanted: set[str] = set()
        self._held: dict[str, LeaseRequest] = {}
        self._lost: set[str] = set()
        self._renewing = False
        self._changed = threading.Condition()
        self._renewal = threading.Lock()

    def acquire(
        self,
        kind: str,
        key: str,
        stages_left: int = 0,
        waits_for: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Return when this trajectory may compute the stage, or when another has.

        `waits_for` is called with what it waits for, when that changes, and with nothing at the end.

        Raises:
            LimitReachedError: no further stage may start.
            TrajectoryCancelledError: no further stage of this trajectory may.
        """
        request, told = LeaseRequest(kind, key, self._holder, stages_left, self._trajectory), ""
        with self._changed:
            while key in self._wanted:
                self._changed.wait()
            self._wanted.add(key)
        try:
            while not (reply := self._coordinator.try_acquire(request, ACQUIRE_WAIT_S)).granted:
                if reply.limit:
                    raise LimitReachedError(f"{reply.limit}; --resume continues")
                if reply.cancelled:
                    raise TrajectoryCancelledError(f"{self._trajectory} was cancelled")
                if reply.waits_for != told:
                    told = reply.waits_for
                    waits_for(told)
        except BaseException:
            self._forget(key)
            raise
        if told:
            waits_for("")
        with self._changed:
            self._held[key] = request
            if not self._renewing:
                self._renewing = True
                threading.Thread(target=self._renew, name="leases", daemon=True).start()

    @property
    def stopping(self) -> Callable[[], bool]:
        """The function that says whether the campaign is to stop."""
        return self._coordinator.stopping

    def release(self, key: str, seconds: float, failed: bool = False) -> None:
        """End the lease on the stage, which is committed or has failed, after `seconds` of computing."""
        try:
            with self._renewal:  # one under way would take the lease anew
                self._coordinator.release(self._held.pop(key), seconds, failed)
        finally:
            self._forget(key)

    def _forget(self, key: str) -> None:
        with self._changed:
            self._wanted.discard(key)
            self._lost.discard(key)
            self._changed.notify_all()

    def _renew(self) -> None:
        """Renew all leases until none is held; what goes wrong is tried again."""
        pause_s = RENEWAL_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._held, pause_s)
                if not self._held:
                    self._renewing = False
                    return
            try:
                with self._renewal:
                    held = list(self._held.values())
                    lost, pause_s = self._coordinator.renew(held), RENEWAL_S
            except Exception as error:  # whatever it is, the stages are still computed
                log.warning("leases could not be renewed, trying again: %s", error)
                pause_s = RETRY_S
                continue
            for key in set(lost) - self._lost:
                log.warning("stage %s was taken over by another trajectory; the first result stays", key[:12])
            self._lost |= set(lost)
