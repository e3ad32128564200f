"""Who computes what: one object that all trajectories of a campaign ask before they compute a stage.

A stage that two trajectories need is computed by the one that asks first; the other
waits, holding no resources, and then finds it in the store. A stage also waits until the
cluster has a place for it; of those that wait, that of a nearly done trajectory goes first.
A claim is a lease: a trajectory that dies stops renewing it, and the next one that asks
takes over. Should two compute the same stage after all, the store keeps the first result.
"""

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.errors import WorkError
from orchestrator.scheduling.admission import Places
from orchestrator.scheduling.limits import Limits, Spent, limit_reached

LEASE_S = 30.0
RENEWAL_S = 5.0
ASK_AGAIN_S = 5.0
LOOK_AGAIN_S = 0.5
"""While somebody waits: how often is looked for claims that have run out, and limits that are reached."""


class LimitReachedError(WorkError):
    """A limit of the campaign is reached: this trajectory ends here and can be resumed."""


class Claims(Protocol):
    """What a trajectory asks for around each stage that is not in the store."""

    def take(self, kind: str, key: str, stages_left: int) -> None:
        """Return when this trajectory may compute the stage, or when another has.

        Raises:
            LimitReachedError: no further stage may start.
        """

    def give_back(self, key: str, seconds: float) -> None:
        """The stage is committed or given up, after `seconds` of computing."""


@dataclass(frozen=True)
class Request:
    """A stage that a trajectory, `holder`, wants to compute; after it, so many are left to it."""

    kind: str
    key: str
    holder: str
    stages_left: int = 0


@dataclass(frozen=True)
class Answer:
    """Whether the asker may compute the stage now; `stop` says why nothing may start any more."""

    granted: bool
    stop: str | None = None


class Coordinator:
    """Who computes what, and what has been spent; a plain object, or held by a Ray actor of many threads.

    `clock` gives seconds that never run backwards; `price` is what earlier runs have spent;
    without `places`, there is room for everything.
    """

    def __init__(
        self,
        limits: Limits,
        price: float = 0.0,
        places: Places | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._limits = limits
        self._places = places
        self._clock = clock
        self._started = clock()
        self._price = price
        self._ended_by: str | None = None
        self._failed: set[str] = set()
        self._granted: dict[str, Request] = {}
        self._waiting: dict[Request, float] = {}
        self._renewed: dict[str, float] = {}
        self._changed = threading.Condition()

    def ask(self, request: Request, wait_s: float = 0.0) -> Answer:
        """Whether the stage may be computed, after a wait of up to `wait_s` seconds for it.

        Asking again for what is granted is granted again.
        """
        deadline = self._clock() + wait_s
        with self._changed:
            answer = self._answer(request)
            while not answer.granted and not answer.stop and (left := deadline - self._clock()) > 0:
                self._changed.wait(min(left, LOOK_AGAIN_S))
                answer = self._answer(request)
            return answer

    def renew(self, holder: str) -> None:
        """`holder` is alive, and so are its claims."""
        with self._changed:
            self._renewed[holder] = self._clock()

    def give_back(self, request: Request, seconds: float) -> None:
        """The stage is done with, and took so long."""
        with self._changed:
            self._price += self._limits.price(request.kind, seconds)
            if self._granted.get(request.key) == request:  # else it was slow, and another has taken over
                del self._granted[request.key]
            self._changed.notify_all()

    def fail(self, trajectory: str) -> None:
        """The trajectory has failed for good."""
        with self._changed:
            self._failed.add(trajectory)
            self._changed.notify_all()

    def ended_by(self) -> str | None:
        """The limit for which a stage was refused; None if none was."""
        return self._ended_by

    def _answer(self, request: Request) -> Answer:
        if stop := self._stopped():
            self._ended_by = stop
            return Answer(False, stop)
        now = self._clock()
        self._forget_the_dead(now)
        at_work = self._granted.get(request.key)
        if at_work is None and not self._has_turn(request):
            self._waiting[request] = now
            return Answer(False)
        # Who waits for another's result is not in the queue.
        self._waiting.pop(request, None)
        if at_work is not None and at_work.holder != request.holder:
            return Answer(False)
        self._granted[request.key] = request
        self._renewed[request.holder] = now
        return Answer(True)

    def _has_turn(self, request: Request) -> bool:
        """Whether there is a place for the stage beside those at work and those that go before it."""
        if self._places is None or request.kind not in self._places.needs:
            return True
        queue = sorted({**self._waiting, request: 0.0}, key=lambda waiting: waiting.stages_left)
        ahead = queue[: queue.index(request)]
        first = {each.key: each.kind for each in (*self._granted.values(), *ahead, request)}
        return self._places.fit(first.values())

    def _forget_the_dead(self, now: float) -> None:
        """Claims that nobody has renewed, and requests that nobody has repeated, for the time of a lease."""
        for key, request in list(self._granted.items()):
            if now - self._renewed[request.holder] >= LEASE_S:
                del self._granted[key]
        for request, asked in list(self._waiting.items()):
            if now - asked >= LEASE_S:
                del self._waiting[request]

    def _stopped(self) -> str | None:
        spent = Spent(len(self._failed), self._clock() - self._started, self._price)
        return limit_reached(self._limits, spent)


class AskedClaims:
    """The claims of one trajectory, on a coordinator reached through `call(method, *arguments)`.

    It may hold several at a time: an evaluation in the background, and what goes on meanwhile.
    """

    def __init__(self, call: Callable[..., Any]):
        self._call = call
        self._holder = uuid.uuid4().hex
        self._held: dict[str, tuple[Request, threading.Event]] = {}

    def take(self, kind: str, key: str, stages_left: int = 0) -> None:
        request, given_back = Request(kind, key, self._holder, stages_left), threading.Event()
        while not (answer := self._call("ask", request, ASK_AGAIN_S)).granted:
            if answer.stop:
                raise LimitReachedError(f"{answer.stop}; --resume continues")
        self._held[key] = (request, given_back)
        threading.Thread(target=self._renew, args=(given_back,), daemon=True).start()

    def give_back(self, key: str, seconds: float) -> None:
        request, given_back = self._held.pop(key)
        given_back.set()
        self._call("give_back", request, seconds)

    def _renew(self, given_back: threading.Event) -> None:
        while not given_back.wait(RENEWAL_S):
            self._call("renew", self._holder)
