"""Progress of a stage."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


class Progress(Protocol):
    """Receives how far a stage is; must be cheap and never raise."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        """Take note of the units done, and of how many there are in all."""


@runtime_checkable
class ClusterProgress(Progress, Protocol):
    """Also receives what a stage on a cluster waits for and for how long, and where it runs."""

    def waits_for(self, reason: str) -> None:
        """Take note of what the stage waits for: "2 GPU; free are 1 of 4"."""

    def runs_on(self, places: Sequence[str]) -> None:
        """Take note of where the stage runs: "worker-3 GPU 0", one place an actor or worker."""

    def waited(self, seconds: float) -> None:
        """Take note of seconds in which the stage had no place and did nothing."""

    def restarted(self, what: str) -> None:
        """Take note of what was lost and is started again: "a worker was lost; restarted, try 1 of 3"."""

    def stop_requested(self) -> bool:
        """Return whether the stage is to end where it can go on later: after a checkpoint."""


class _NoProgress:
    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        pass

    def waits_for(self, reason: str) -> None:
        pass

    def runs_on(self, places: Sequence[str]) -> None:
        pass

    def waited(self, seconds: float) -> None:
        pass

    def restarted(self, what: str) -> None:
        pass

    def stop_requested(self) -> bool:
        return False


no_progress: ClusterProgress = _NoProgress()
"""Reports nothing; a `ClusterProgress`."""


def on_cluster(progress: Progress) -> ClusterProgress:
    """Return `progress`, or where it takes no reports from a cluster, what passes on the counts alone."""
    return progress if isinstance(progress, ClusterProgress) else WaitingTime(progress)


class WaitingTime:
    """Passes on a stage's progress and adds up the seconds that it waited."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self.waited_s = 0.0

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        self._progress(done, total, note)

    def waits_for(self, reason: str) -> None:
        """Pass on what the stage waits for."""
        if isinstance(self._progress, ClusterProgress):
            self._progress.waits_for(reason)

    def runs_on(self, places: Sequence[str]) -> None:
        """Pass on where the stage runs."""
        if isinstance(self._progress, ClusterProgress):
            self._progress.runs_on(places)

    def waited(self, seconds: float) -> None:
        """Count seconds in which the stage waited."""
        self.waited_s += seconds

    def restarted(self, what: str) -> None:
        """Pass on what was lost and is started again."""
        if isinstance(self._progress, ClusterProgress):
            self._progress.restarted(what)

    def stop_requested(self) -> bool:
        """Pass on whether the stage is to end."""
        return isinstance(self._progress, ClusterProgress) and self._progress.stop_requested()
