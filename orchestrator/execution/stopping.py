"""Ends a campaign on request: at the first Ctrl-C or SIGTERM in good order, at the second at once.

In good order means that no further stage starts, and that those at work may finish, or reach a checkpoint,
within a stated time.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from orchestrator.execution.connection import JOB_CONFIG_VARIABLE

log = logging.getLogger(__name__)

JOB_LIMIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
"""How long Ray waits between the SIGTERM and the SIGKILL of `ray job stop`; set where the head starts."""

JOB_LIMIT_S = 3.0
"""That time where the variable does not say it."""

REPEAT_S = 5.0
"""How often the request is repeated: a coordinator that Ray starts again knows nothing of the one before."""

MARGIN_S = 2.0
"""Of that time, what the driver needs to end."""


def patience_s(signum: int, timeout_s: float, environment: Mapping[str, str] = os.environ) -> float:
    """Return how long stages at work have after a first signal: `timeout_s`, unless Ray kills sooner."""
    if signum != signal.SIGTERM or JOB_CONFIG_VARIABLE not in environment:
        return timeout_s
    limit_s = float(environment.get(JOB_LIMIT_VARIABLE) or JOB_LIMIT_S)
    return min(timeout_s, max(0.0, limit_s - MARGIN_S))


def _say(line: str) -> None:
    log.warning("%s", line)
    sys.stderr.write(f"{line}\n")


class StopRequest:
    """What a campaign does at Ctrl-C and SIGTERM.

    Args:
        timeout_s: how long stages at work have to finish or to reach a checkpoint.
        say: shows a line to the user, and logs it.
    """

    def __init__(self, timeout_s: float, say: Callable[[str], None] = _say):
        self._timeout_s, self._say = timeout_s, say
        self._stop: Callable[[str], None] | None = None
        self._requested = False
        self._over = threading.Event()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take both signals while the body runs; to be entered after Ray installed a handler of its own."""
        before = {each: signal.signal(each, self._handle) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self._over.set()
            for each, handler in before.items():
                signal.signal(each, handler)

    @contextmanager
    def calls(self, stop: Callable[[str], None]) -> Iterator[None]:
        """Call `stop` with the reason at the first signal while the body runs; else that ends it at once."""
        self._stop = stop
        try:
            yield
        finally:
            self._stop = None

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self._requested or self._stop is None:
            raise KeyboardInterrupt
        self._requested = True
        # In a thread: a handler may interrupt the very call, or the very print, that it would make itself.
        threading.Thread(target=self._stop_in_order, args=(signum, self._stop), daemon=True).start()

    def _stop_in_order(self, signum: int, stop: Callable[[str], None]) -> None:
        left_s = patience_s(signum, self._timeout_s)
        name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
        self._say(
            f"Stopping ({name}): no further stage starts; those at work have {left_s:g} s to finish or to "
            f"reach a checkpoint. {name} once more stops at once."
        )
        end = time.monotonic() + left_s
        while True:
            try:
                stop(f"stopped by {name}")
            except Exception as error:
                log.warning("the coordinator was not reached (%s); stopping at once", error)
                end = left_s = 0.0
            if self._over.wait(max(0.0, min(REPEAT_S, end - time.monotonic()))):
                return
            if time.monotonic() >= end:
                break
        self._say(f"Stopping now: stages were still at work after {left_s:g} s.")
        os.kill(os.getpid(), signal.SIGINT)
