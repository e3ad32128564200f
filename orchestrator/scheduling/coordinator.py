"""Leases on stages: one object from which all trajectories of a campaign acquire what they will compute.

A stage that two trajectories need is computed by the one that requests it first; the other
waits, holding no resources, and then finds it in the store. A stage also waits until the
cluster has room for it; of those that wait, that of a nearly done trajectory goes first.
What it gets is a lease: a trajectory whose process ends stops renewing it, and the next one that
requests it takes over. Should two compute the same stage after all, the store keeps the first result.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.scheduling.admission import AdmissionController, Candidate
from orchestrator.scheduling.limits import Limits, Spent, limit_reached
from orchestrator.storage.control import Directives
from orchestrator.storage.usage import Usage

LEASE_S = 30.0
RENEWAL_S = 5.0
PAUSED = "the run is paused; `iterabre continue` goes on"

EXPIRY_CHECK_S = 0.5
"""While a request waits: how often expired leases, limits and the room on the cluster are looked at."""

PRESENT_S = 5.0
"""A request that was not repeated for so long is granted nothing: its process may have ended."""

PATIENCE_S = 60.0
"""How long others may pass a stage that does not fit; then it keeps the room that becomes free."""

SETTLE_S = 2 * RENEWAL_S
"""How long a coordinator that was started again waits for the renewals of leases that it does not know."""


@dataclass(frozen=True)
class LeaseRequest:
    """A stage that a trajectory's process, `holder`, is to compute; after it, so many are left to it.

    `kind` is as in `scheduling.resources`.
    """

    kind: str
    key: str
    holder: str
    stages_left: int = 0
    trajectory: str = ""


@dataclass(frozen=True)
class LeaseReply:
    """Whether the stage may be computed now; `limit` says why no stage may start any more.

    `waits_for` says what a stage waits for that is not granted; none of a trajectory that is `cancelled`
    ever is.
    """

    granted: bool
    limit: str | None = None
    cancelled: bool = False
    waits_for: str = field(default="", compare=False)


class CoordinatorClient(Protocol):
    """A coordinator as trajectories call it; one in the same process is a client by itself."""

    def try_acquire(self, request: LeaseRequest, wait_s: float = 0.0) -> LeaseReply:
        """Return whether the stage may be computed, after a wait of up to `wait_s` seconds for it."""

    def release(self, request: LeaseRequest, seconds: float, failed: bool = False) -> None:
        """End a lease: the stage is committed, or has failed, after `seconds` of computing."""

    def renew(self, held: Sequence[LeaseRequest]) -> Sequence[str]:
        """Keep leases from expiring; return the keys of those that another holds by now."""

    def fail(self, trajectory: str) -> None:
        """Count a trajectory that has failed for good."""

    def ended_by(self) -> str | None:
        """Return the limit for which a stage was refused; None if none was."""

    def stop(self, reason: str) -> None:
        """Start no further stage, and have those that can end early do so."""

    def stopping(self) -> bool:
        """Return whether the campaign is to stop."""

    def is_cancelled(self, trajectory: str) -> bool:
        """Return whether an operator has cancelled the trajectory."""


@dataclass
class _Waiting:
    """A request in the queue: when it was made, first and last, and first passed by one behind it."""

    first_asked: float
    last_asked: float
    passed_at: float | None = None
    reason: str = ""


class Coordinator:
    """Leases on stages, and what has been spent; a plain object, or held by a Ray actor of many threads.

    Args:
        price: what was spent before.
        usage: what has been used since the start of the campaign.
        failed: the trajectories that have failed since the start of the campaign.
        elapsed_s: seconds since that start.
        settle_s: grants nothing for so long, as leases may be held that it does not know.
        admission: without it, every stage is admitted.
        control: gives what an operator wants: pauses, cancellations, priorities.
        clock: gives seconds that never run backwards.
    """

    def __init__(
        self,
        limits: Limits,
        price: float = 0.0,
        admission: AdmissionController | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        failed: Sequence[str] = (),
        elapsed_s: float = 0.0,
        settle_s: float = 0.0,
        control: Callable[[], Directives] = Directives,
        usage: Usage = Usage(),
    ):
        self._limits = limits
        self._admission = admission
        self._clock = clock
        self._control = control
        self._started = clock() - elapsed_s
        self._settled_at = clock() + settle_s
        self._price = price
        self._usage = usage
        self._ended_by: str | None = None
        self._stopped_by: str | None = None
        self._failed = set(failed)
        self._granted: dict[str, LeaseRequest] = {}
        self._renewed: dict[str, float] = {}
        self._waiting: dict[LeaseRequest, _Waiting] = {}
        self._looked_at: float | None = None
        self._changed = threading.Condition()

    def try_acquire(self, request: LeaseRequest, wait_s: float = 0.0) -> LeaseReply:
        """Return whether the stage may be computed, after a wait of up to `wait_s` seconds for it.

        A lease that is held is granted again.
        """
        deadline = self._clock() + wait_s
        with self._changed:
            reply = self._reply(request)
            while reply == LeaseReply(False) and (left := deadline - self._clock()) > 0:
                self._changed.wait(min(left, EXPIRY_CHECK_S))
                reply = self._reply(request)
            return reply

    def renew(self, held: Sequence[LeaseRequest]) -> Sequence[str]:
        """Keep leases from expiring; return the keys of those that another holds by now.

        A lease that is not known is held from now on: this coordinator was started again since, or the
        lease expired and nobody took it.
        """
        with self._changed:
            lost = []
            for request in held:
                if self._granted.setdefault(request.key, request).holder == request.holder:
                    self._renewed[request.key] = self._clock()
                else:
                    lost.append(request.key)
            return lost

    def release(self, request: LeaseRequest, seconds: float, failed: bool = False) -> None:
        """End a lease: the stage is committed, or has failed, after `seconds` of computing."""
        with self._changed:
            self._price += self._limits.price(request.kind, seconds)
            device_s = self._limits.devices.get(request.kind, 0.0) * seconds
            self._usage += Usage(failed_s=device_s) if failed else Usage(worked_s=device_s)
            granted = self._granted.get(request.key)
            if granted and granted.holder == request.holder:  # else it was slow, and another has taken over
                del self._granted[request.key]
            self._look_again()

    def count_nodes(self, seconds: float) -> Usage:
        """Count the devices of nodes that were up for so long; return what has been used so far."""
        nodes = self._admission.nodes() if self._admission else ()
        on_gpus = any(node.gpus for node in nodes)
        devices = sum(node.devices(on_gpus) for node in nodes if node.is_up)
        with self._changed:
            self._usage += Usage(up_s=devices * seconds)
            return self._usage

    def fail(self, trajectory: str) -> None:
        """Count a trajectory that has failed for good."""
        with self._changed:
            self._failed.add(trajectory)
            self._look_again()

    def ended_by(self) -> str | None:
        """Return the limit for which a stage was refused; None if none was."""
        return self._ended_by or self._stopped_by

    def stop(self, reason: str) -> None:
        """Start no further stage, and have those that can end early do so."""
        with self._changed:
            self._stopped_by = reason
            self._look_again()

    def stopping(self) -> bool:
        """Return whether the campaign is to stop."""
        return self._stopped_by is not None

    def is_cancelled(self, trajectory: str) -> bool:
        """Return whether an operator has cancelled the trajectory."""
        return trajectory in self._control().cancelled

    def _look_again(self) -> None:
        self._looked_at = None
        self._changed.notify_all()

    def _reply(self, request: LeaseRequest) -> LeaseReply:
        now = self._clock()
        spent = Spent(len(self._failed), now - self._started, self._price)
        if limit := self._stopped_by or limit_reached(self._limits, spent):
            self._ended_by = limit
            return LeaseReply(False, limit)
        wanted = self._control()
        self._expire(now, wanted)
        if request.trajectory in wanted.cancelled:
            return LeaseReply(False, cancelled=True)
        if request.key not in self._granted:
            if request not in self._waiting:
                self._waiting[request] = _Waiting(now, now)
                self._looked_at = None
            waiting = self._waiting[request]
            waiting.last_asked = now
            if self._looked_at is None or now - self._looked_at >= EXPIRY_CHECK_S:
                self._looked_at = now
                self._grant_what_fits(now, wanted)
        granted = self._granted.get(request.key)
        if granted is None:
            return LeaseReply(False, waits_for=waiting.reason)
        # A request that waits for another's result is not in the queue.
        self._waiting.pop(request, None)
        if granted.holder != request.holder:
            other = granted.trajectory or "another trajectory"
            return LeaseReply(False, waits_for=f"the same stage, which {other} computes")
        self._renewed[request.key] = now
        return LeaseReply(True)

    def _expire(self, now: float, wanted: Directives) -> None:
        """End leases that were not renewed, and requests that were not repeated, for the time of a lease.

        Those of cancelled trajectories end at once.
        """
        for key, granted in list(self._granted.items()):
            if now - self._renewed[key] >= LEASE_S or granted.trajectory in wanted.cancelled:
                del self._granted[key]
                self._looked_at = None
        for request, asked in list(self._waiting.items()):
            if now - asked.last_asked >= LEASE_S or request.trajectory in wanted.cancelled:
                del self._waiting[request]
                self._looked_at = None

    def _grant_what_fits(self, now: float, wanted: Directives) -> None:
        """Grant what the cluster has room for to those that wait, in the order of the queue."""
        if wanted.paused:
            for waiting in self._waiting.values():
                waiting.reason = PAUSED
            return
        if now < self._settled_at:
            for waiting in self._waiting.values():
                waiting.reason = "the leases that were held before the coordinator was started again"
            return
        keeping = {
            request
            for request, waiting in self._waiting.items()
            if waiting.passed_at is not None and now - waiting.passed_at >= PATIENCE_S
        }

        def turn(request: LeaseRequest) -> tuple[float, ...]:
            asked, keeps = self._waiting[request].first_asked, request in keeping
            return (
                -wanted.priorities.get(request.trajectory, 0),
                not keeps,
                asked if keeps else request.stages_left,
                asked,
            )

        first: dict[str, LeaseRequest] = {}
        for request in sorted(self._waiting, key=turn):
            present = now - self._waiting[request].last_asked <= PRESENT_S
            if present and request.key not in self._granted:
                first.setdefault(request.key, request)
        queue = list(first.values())
        reasons: list[str | None] = [None] * len(queue)
        if self._admission is not None:
            at_work = [request.kind for request in self._granted.values()]
            reasons = self._admission.admit(at_work, [Candidate(r.kind, r in keeping) for r in queue])
        passing = False
        for request, reason in reversed(list(zip(queue, reasons, strict=True))):
            waiting = self._waiting[request]
            waiting.reason = reason or ""
            if reason is None:
                self._granted[request.key], self._renewed[request.key] = request, now
                passing = passing or (
                    self._admission is not None and request.kind in self._admission.requests
                )
            elif passing and waiting.passed_at is None:
                waiting.passed_at = now
        if None in reasons:
            self._changed.notify_all()
