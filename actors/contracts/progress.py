"""Progress of a stage."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (units done, units in all, note); must be cheap and never raise."""


def no_progress(done: int, total: int, note: str = "") -> None:
    """Report nothing; a `Progress`."""
