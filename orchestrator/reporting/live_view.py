"""What a driver shows while its trajectories run: in place in a terminal, otherwise line by line."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live

from orchestrator.reporting.data.run_status import RunStatus, TrajectoryView, run_status
from orchestrator.reporting.tables.status import (
    activity_count,
    activity_name,
    measured_text,
    overview_text,
    status_text,
)
from orchestrator.storage.control import Control
from orchestrator.storage.run_progress import Overview, RunProgress, TrajectoryProgress

log = logging.getLogger(__name__)

LOOK_S = 0.5
GOES_ON_S = 60.0
"""Seconds between two lines of a trajectory that goes on with the same stages and has got further."""

SILENT_S = 600.0
"""As much for one that has not."""

WAIT_S = 10.0
"""From when on a wait is told as such: less is the start of a process."""

AT_ONCE = 10
"""With more trajectories under way than this, each has its lines more seldom."""

Snapshot = Callable[[], Sequence[TrajectoryProgress]]
MakeOverview = Callable[[Sequence[TrajectoryProgress]], Overview | None]


def stamped(text: str) -> str:
    """Return a line with the time of day in front."""
    return f"{time.strftime('%H:%M:%S')} {text}"


@contextmanager
def live_view(
    snapshot: Snapshot,
    planned: Mapping[str, int],
    overview: MakeOverview = lambda _: None,
    stream: TextIO | None = None,
) -> Iterator[None]:
    """Show the progress while the body runs: live in a terminal, plain lines otherwise.

    The lines are logged, too, so that the driver's log tells the same.

    Args:
        snapshot: gives what the trajectories that have begun have reported.
        planned: the number of iterations of every trajectory, also of those that wait for their turn.
        overview: makes of those reports how far the campaign is.
    """
    console = Console(file=stream or sys.stderr)
    lines, stop = ProgressLines(), threading.Event()

    def status() -> RunStatus:
        reports, now = snapshot(), time.time()
        return run_status(
            planned, {}, RunProgress(now, "", False, reports, overview(reports)), Control(), now
        )

    def look(live: Live | None) -> None:
        try:
            found, now = status(), time.time()
        except Exception as error:  # the board, or the head, may be away for a moment
            log.warning("how far the trajectories are is not known for the moment: %s", error)
            return
        for line in lines.new(found, now):
            log.info("%s", line)
            if live is None:
                console.print(stamped(line), markup=False, highlight=False, soft_wrap=True)
        if live is not None:
            live.update(render(found, now))

    def show() -> None:
        in_place = Live(console=console, refresh_per_second=4, transient=True)
        with in_place if console.is_terminal else nullcontext() as live:
            while not stop.wait(LOOK_S):
                look(live)
            look(live)

    thread = threading.Thread(target=show, name="live view", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def render(status: RunStatus, now: float) -> Group:
    """Render the state of a run for rich, as `iterabre status` does."""
    text = status_text(status, now, driver="running; Ctrl-C ends in good order, --resume continues")
    text.rstrip()
    text.no_wrap, text.overflow = True, "ellipsis"
    return Group(text)


class ProgressLines:
    """Decides which lines are new: of a trajectory at another stage, that waits, is restarted or ends.

    Within a stage that goes on there is one a minute at most, and none that is the same as before unless ten
    minutes have passed.
    """

    def __init__(self) -> None:
        self._shown: dict[str, tuple[Any, str, float]] = {}
        self._overall: tuple[str, float] = ("", 0.0)

    def new(self, status: RunStatus, now: float) -> list[str]:
        """Return the lines that are to be shown now; the last one is about the run as a whole."""
        begun = [view for view in status.trajectories if view.state != "not started"]
        interval_s = GOES_ON_S * max(1.0, sum(bool(view.activities) for view in begun) / AT_ONCE)
        lines = []
        for view in begun:
            state, text = _state(view, now), trajectory_line(view)
            if not view.activities and view.state in ("running", "waiting"):
                continue  # between two stages
            before, shown, when = self._shown.get(view.trajectory, (None, "", 0.0))
            wait_s = interval_s if text != shown else SILENT_S
            if state != before or (view.activities and now - when >= wait_s):
                self._shown[view.trajectory] = (state, text, now)
                lines.append(text)
        said, when = self._overall
        overall = overall_line(status, now)
        counts = overall.partition(",")[0]
        if overall and lines and (counts != said or now - when >= GOES_ON_S):
            self._overall = (counts, now)
            lines.append(overall)
        return lines


def _state(view: TrajectoryView, now: float) -> Any:
    """Return what makes a new line at once when it changes."""
    stages = [
        (
            each.iteration,
            each.stage,
            each.phase,
            bool(each.waits_for) and now - each.waits_since >= WAIT_S,
            each.restarted,
        )
        for each in view.activities
    ]
    return view.state if not view.activities else "", view.iteration, stages


def trajectory_line(view: TrajectoryView) -> str:
    """Return where a trajectory is and what it is at, as one plain line."""
    head = f"{view.trajectory}: "
    measured = "".join(f", {text}" for text in (measured_text(view),) if text)
    if not view.activities:
        return f"{head}{view.state}{measured}" + (f": {view.reason}" if view.reason else "")
    parts = []
    for each in view.activities:
        about = f"waits for {each.waits_for}" if each.waits_for else activity_count(each)
        parts.append(" ".join(filter(None, (activity_name(each, view), about))))
        if each.restarted:
            parts[-1] += f" ({each.restarted})"
    place = (
        f"iteration {view.iteration}/{view.iterations}, {view.stages_done}/{view.stages_total} stages done"
    )
    return f"{head}{place}{measured}: {'; '.join(parts)}"


def overall_line(status: RunStatus, now: float) -> str:
    """Return how far the run is as a whole, as one plain line."""
    if status.overview is None:
        return ""
    counts = ", ".join(f"{count} {state}" for state, count in status.counts.items())
    return f"all: {overview_text(status.overview, now)}; {len(status.trajectories)} trajectories: {counts}"
