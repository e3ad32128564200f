"""Single flight and limits: one object that all trajectories of a campaign ask before they compute a stage.

A stage that two trajectories need is computed by the one that asks first; the other
waits, holding no resources, and then finds it in the store. A claim is a lease: a
trajectory that dies stops renewing it, and the next one that asks takes over. Should
two compute the same stage after all, the store keeps the first result.
"""

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.errors import WorkError
from orchestrator.limits import Limits, Spent, limit_reached

LEASE_S = 30.0
RENEWAL_S = 5.0
ASK_AGAIN_S = 0.5


class LimitReachedError(WorkError):
    """A limit of the campaign is reached: this trajectory ends here and can be resumed."""


class Claims(Protocol):
    """What a trajectory asks for around each stage that is not in the store."""

    def take(self, kind: str, key: str) -> None:
        """Return when this trajectory may compute the stage, or when another has.

        Raises:
            LimitReachedError: no further stage may start.
        """

    def give_back(self, kind: str, key: str, seconds: float) -> None:
        """The stage is committed or given up, after `seconds` of computing."""


@dataclass(frozen=True)
class Answer:
    """Whether the asker may compute the stage now; `stop` says why nothing may start any more."""

    granted: bool
    stop: str | None = None


class Coordinator:
    """Who computes what, and what has been spent; a plain object, or held by a Ray actor.

    `clock` gives seconds that never run backwards; `price` is what earlier runs have spent.
    """

    def __init__(self, limits: Limits, price: float = 0.0, clock: Callable[[], float] = time.monotonic):
        self._limits = limits
        self._clock = clock
        self._started = clock()
        self._price = price
        self._ended_by: str | None = None
        self._failed: set[str] = set()
        self._holders: dict[str, str] = {}
        self._renewed: dict[str, float] = {}

    def ask(self, key: str, holder: str) -> Answer:
        """Whether `holder` may compute the stage `key`; asking again while holding it is granted again."""
        if stop := self._stopped():
            self._ended_by = stop
            return Answer(False, stop)
        now = self._clock()
        current = self._holders.get(key)
        if current not in (None, holder) and now - self._renewed[current] < LEASE_S:
            return Answer(False)
        self._holders[key] = holder
        self._renewed[holder] = now
        return Answer(True)

    def renew(self, holder: str) -> None:
        """`holder` is alive, and so are its claims."""
        self._renewed[holder] = self._clock()

    def give_back(self, kind: str, key: str, holder: str, seconds: float) -> None:
        """`holder` is done with the stage, which took so long."""
        self._price += self._limits.price(kind, seconds)
        if self._holders.get(key) == holder:
            del self._holders[key]

    def fail(self, trajectory: str) -> None:
        """The trajectory has failed for good."""
        self._failed.add(trajectory)

    def ended_by(self) -> str | None:
        """The limit for which a stage was refused; None if none was."""
        return self._ended_by

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
        self._held: dict[str, threading.Event] = {}

    def take(self, kind: str, key: str) -> None:
        while not (answer := self._call("ask", key, self._holder)).granted:
            if answer.stop:
                raise LimitReachedError(f"{answer.stop}; --resume continues")
            time.sleep(ASK_AGAIN_S)
        self._held[key] = threading.Event()
        threading.Thread(target=self._renew, args=(self._held[key],), daemon=True).start()

    def give_back(self, kind: str, key: str, seconds: float) -> None:
        self._held.pop(key).set()
        self._call("give_back", kind, key, self._holder, seconds)

    def _renew(self, given_back: threading.Event) -> None:
        while not given_back.wait(RENEWAL_S):
            self._call("renew", self._holder)
