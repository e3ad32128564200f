"""The failures of a training, and how it goes on after the loss of workers; needs neither torch nor Ray."""

from collections.abc import Sequence
from dataclasses import dataclass

from actors.errors import IterabreError, WorkError

LOST_PEER = ("gloo", "peer", "nccl", "tcpstore", "socket closed", "broken pipe", "connection reset")
"""What collective operations say, in lower case, when the process at the other end is lost."""


class DivergenceError(WorkError):
    """The loss or its gradient is no longer a number; trying again would end the same."""


class MicroBatchError(WorkError):
    """A micro-batch did not fit into memory; a smaller one is noted for the next try."""


def is_lost_peer(error: BaseException) -> bool:
    """Return whether a worker only failed because another one was lost in the middle of an exchange."""
    if isinstance(error, IterabreError):
        return False
    if any(
        kind.__name__ in ("DistError", "DistBackendError", "DistNetworkError") for kind in type(error).__mro__
    ):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError | ConnectionError) and any(word in said for word in LOST_PEER)


def worker_counts(batch_size: int, workers: int) -> Sequence[int]:
    """Return how many workers a batch can be divided among, from `workers` down to one."""
    return [workers, *(count for count in range(workers - 1, 0, -1) if batch_size % count == 0)]


FEWER_START_S = 30.0
"""How long fewer workers than were asked for may take to get their places, before still fewer are tried."""


@dataclass
class Restarts:
    """Decides with how many workers a training goes on, and how long these may wait for their places.

    Attributes:
        counts: the numbers of workers that are possible, the one that was asked for first.
        max_failures: losses that are survived.
        start_timeout_s: how long workers may wait at first; for ever if None.
        replacement_timeout_s: how long lost workers may be missing before fewer go on; for ever if None.
        count, timeout_s: what is to be tried next.
        missing_s: for how long there were no places, before the last try.
    """

    counts: Sequence[int]
    max_failures: int
    start_timeout_s: float | None = None
    replacement_timeout_s: float | None = None
    failures: int = 0
    missing_s: float = 0.0
    _replacing: bool = False

    def __post_init__(self) -> None:
        self.count, self.timeout_s = self.counts[0], self.start_timeout_s

    def go_on_after_loss(self, announced: bool) -> bool:
        """Try all workers again, for replacements may have come; return False to give up.

        A machine that was announced to be taken away is no failure.
        """
        self.failures += not announced
        self._replacing = self.replacement_timeout_s is not None
        self.count = self.counts[0]
        self.timeout_s = self.replacement_timeout_s if self._replacing else self.start_timeout_s
        return self.failures <= self.max_failures

    def go_on_without_places(self) -> bool:
        """Try fewer workers, or all once more if there is no place for one; return False to give up."""
        if not self._replacing:
            return False
        self.missing_s += self.timeout_s or 0.0
        fewer = [count for count in self.counts if count < self.count]
        if fewer:
            self.count, self.timeout_s = fewer[0], FEWER_START_S
        else:
            self.count, self.timeout_s, self._replacing = self.counts[0], self.start_timeout_s, False
        return True
