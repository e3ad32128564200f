"""Progress of a stage."""

from collections.abc import Sequence
from typing import Protocol


class Progress(Protocol):
    """Receives how far a stage is; must be cheap and never raise."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        """Take note of the units done, and of how many there are in all."""


class ClusterProgress(Progress, Protocol):
    """Also receives what a stage on a cluster waits for, and where it runs."""

    def waits_for(self, reason: str) -> None:
        """Take note of what the stage waits for: "2 GPU; free are 1 of 4"."""

    def runs_on(self, places: Sequence[str]) -> None:
        """Take note of where the stage runs: "worker-3 GPU 0", one place an actor or worker."""


class _NoProgress:
    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        pass

    def waits_for(self, reason: str) -> None:
        pass

    def runs_on(self, places: Sequence[str]) -> None:
        pass


no_progress: ClusterProgress = _NoProgress()
"""Reports nothing; a `ClusterProgress`."""
