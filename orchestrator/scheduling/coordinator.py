"""Leases on stages: one object from which all trajectories of a campaign acquire what they will compute.

A stage that two trajectories need is computed by the one that requests it first; the other
waits, holding no resources, and then finds it in the store. A stage also waits until the
cluster has resources for it; of those that wait, that of a nearly done trajectory goes first.
What it gets is a lease: a trajectory whose process ends stops renewing it, and the next one that
requests it takes over. Should two compute the same stage after all, the store keeps the first result.
"""

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.errors import WorkError
from orchestrator.scheduling.admission import AdmissionController
from orchestrator.scheduling.limits import Limits, Spent, limit_reached
from orchestrator.storage.control import Directives

LEASE_S = 30.0
RENEWAL_S = 5.0
ACQUIRE_WAIT_S = 5.0
"""How long one call to the coordinator waits for a lease."""

EXPIRY_CHECK_S = 0.5
"""While a request waits: how often leases that have expired and limits that are reached are looked for."""


PAUSED = "the run is paused; `iterabre continue` goes on"


class TrajectoryCancelledError(WorkError):
    """An operator has cancelled this trajectory."""


class LimitReachedError(WorkError):
    """A limit of the campaign is reached: this trajectory ends here and can be resumed."""


@dataclass(frozen=True)
class LeaseRequest:
    """A stage that `trajectory`, in the process `holder`, is to compute; after it, so many are left to it.

    `kind` is as in `scheduling.resources`.
    """

    kind: str
    key: str
    holder: str
    stages_left: int = 0
    trajectory: str = ""


@dataclass(frozen=True)
class LeaseReply:
    """Whether the stage may be computed now.

    `limit` says why no stage may start any more, `waits_for` why this one may not yet; no stage of a
    trajectory that is `cancelled` ever may.
    """

    granted: bool
    limit: str | None = None
    cancelled: bool = False
    waits_for: str = field(default="", compare=False)


class CoordinatorClient(Protocol):
    """A coordinator as trajectories call it; one in the same process is a client by itself."""

    def try_acquire(self, request: LeaseRequest, wait_s: float = 0.0) -> LeaseReply:
        """Return whether the stage may be computed, after a wait of up to `wait_s` seconds for it."""

    def release(self, request: LeaseRequest, seconds: float) -> None:
        """End a lease: the stage is committed or given up, after `seconds` of computing."""

    def renew(self, holder: str) -> None:
        """Keep the leases of `holder` from expiring."""

    def fail(self, trajectory: str) -> None:
        """Count a trajectory that has failed for good."""

    def ended_by(self) -> str | None:
        """Return the limit for which a stage was refused; None if none was."""

    def is_cancelled(self, trajectory: str) -> bool:
        """Return whether an operator has cancelled the trajectory."""


class Coordinator:
    """Leases on stages, and what has been spent; a plain object, or held by a Ray actor of many threads.

    `clock` gives seconds that never run backwards; `price` is what earlier runs have spent;
    without `admission`, every stage is admitted; `control` gives what an operator wants.
    """

    def __init__(
        self,
        limits: Limits,
        price: float = 0.0,
        admission: AdmissionController | None = None,
        clock: Callable[[], float] = time.monotonic,
        control: Callable[[], Directives] = Directives,
    ):
        self._limits = limits
        self._admission = admission
        self._clock = clock
        self._control = control
        self._started = clock()
        self._price = price
        self._ended_by: str | None = None
        self._failed: set[str] = set()
        self._granted: dict[str, LeaseRequest] = {}
        self._waiting: dict[LeaseRequest, float] = {}
        self._renewed: dict[str, float] = {}
        self._changed = threading.Condition()

    def try_acquire(self, request: LeaseRequest, wait_s: float = 0.0) -> LeaseReply:
        """Return whether the stage may be computed, after a wait of up to `wait_s` seconds for it.

        A lease that is held is granted again.
        """
        deadline = self._clock() + wait_s
        with self._changed:
            reply = self._reply(request)
            while not reply.granted and not reply.limit and (left := deadline - self._clock()) > 0:
                self._changed.wait(min(left, EXPIRY_CHECK_S))
                reply = self._reply(request)
            return reply

    def renew(self, holder: str) -> None:
        """Keep the leases of `holder` from expiring."""
        with self._changed:
            self._renewed[holder] = self._clock()

    def release(self, request: LeaseRequest, seconds: float) -> None:
        """End a lease: the stage is committed or given up, after `seconds` of computing."""
        with self._changed:
            self._price += self._limits.price(request.kind, seconds)
            if self._granted.get(request.key) == request:  # else it was slow, and another has taken over
                del self._granted[request.key]
            self._changed.notify_all()

    def fail(self, trajectory: str) -> None:
        """Count a trajectory that has failed for good."""
        with self._changed:
            self._failed.add(trajectory)
            self._changed.notify_all()

    def ended_by(self) -> str | None:
        """Return the limit for which a stage was refused; None if none was."""
        return self._ended_by

    def is_cancelled(self, trajectory: str) -> bool:
        """Return whether an operator has cancelled the trajectory."""
        return trajectory in self._control().cancelled

    def _reply(self, request: LeaseRequest) -> LeaseReply:
        spent = Spent(len(self._failed), self._clock() - self._started, self._price)
        if limit := limit_reached(self._limits, spent):
            self._ended_by = limit
            return LeaseReply(False, limit)
        now, wanted = self._clock(), self._control()
        if request.trajectory in wanted.cancelled:
            self._waiting.pop(request, None)
            return LeaseReply(False, cancelled=True)
        # Leases that were not renewed, and requests that were not repeated, for the time of a lease end.
        for key, granted in list(self._granted.items()):
            if now - self._renewed[granted.holder] >= LEASE_S or granted.trajectory in wanted.cancelled:
                del self._granted[key]
        for waiting, asked in list(self._waiting.items()):
            if now - asked >= LEASE_S:
                del self._waiting[waiting]
        at_work = self._granted.get(request.key)
        if at_work is None and wanted.paused:
            self._waiting.pop(request, None)
            return LeaseReply(False, waits_for=PAUSED)
        if at_work is None and not self._has_turn(request):
            self._waiting[request] = now
            return LeaseReply(False, waits_for="room on the cluster")
        # A request that waits for another's result is not in the queue.
        self._waiting.pop(request, None)
        if at_work is not None and at_work.holder != request.holder:
            return LeaseReply(False, waits_for=f"the same stage, which {at_work.trajectory} computes")
        self._granted[request.key] = request
        self._renewed[request.holder] = now
        return LeaseReply(True)

    def _has_turn(self, request: LeaseRequest) -> bool:
        """Return whether the cluster takes the stage beside those at work and those that go before it."""
        if self._admission is None or request.kind not in self._admission.requests:
            return True
        priorities = self._control().priorities
        queue = sorted(
            {**self._waiting, request: 0.0},
            key=lambda waiting: (-priorities.get(waiting.trajectory, 0), waiting.stages_left),
        )
        ahead = queue[: queue.index(request)]
        first = {each.key: each.kind for each in (*self._granted.values(), *ahead, request)}
        return self._admission.can_admit(first.values())


class Leases:
    """The leases of one trajectory, acquired from a coordinator.

    It may hold several at a time: an evaluation in the background, and what goes on meanwhile.
    """

    def __init__(self, coordinator: CoordinatorClient, trajectory: str = ""):
        self._coordinator = coordinator
        self._trajectory = trajectory
        self._holder = uuid.uuid4().hex
        self._held: dict[str, tuple[LeaseRequest, threading.Event]] = {}

    def acquire(
        self, kind: str, key: str, stages_left: int = 0, waits_for: Callable[[str], None] = lambda _: None
    ) -> None:
        """Return when this trajectory may compute the stage, or when another has.

        `waits_for` is called with what it waits for, and with nothing when the wait is over.

        Raises:
            LimitReachedError: no further stage may start.
            TrajectoryCancelledError: no further stage of this trajectory may.
        """
        request = LeaseRequest(kind, key, self._holder, stages_left, self._trajectory)
        released, reason = threading.Event(), ""
        # The first call does not wait, so that a wait is seen at once.
        reply = self._coordinator.try_acquire(request)
        while not reply.granted:
            if reply.limit:
                raise LimitReachedError(f"{reply.limit}; --resume continues")
            if reply.cancelled:
                raise TrajectoryCancelledError(f"{self._trajectory} was cancelled")
            if reply.waits_for != reason:
                reason = reply.waits_for
                waits_for(reason)
            reply = self._coordinator.try_acquire(request, ACQUIRE_WAIT_S)
        if reason:
            waits_for("")
        self._held[key] = (request, released)
        threading.Thread(target=self._renew, args=(released,), daemon=True).start()

    def release(self, key: str, seconds: float) -> None:
        """End the lease on the stage, after `seconds` of computing."""
        request, released = self._held.pop(key)
        released.set()
        self._coordinator.release(request, seconds)

    def _renew(self, released: threading.Event) -> None:
        while not released.wait(RENEWAL_S):
            self._coordinator.renew(self._holder)
