"""How far a campaign is: a `ProgressBoard` that stages report to, and the live view of it in a terminal."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.storage.run_progress import TrajectoryProgress

log = logging.getLogger(__name__)

POST_INTERVAL_S = 0.3
STOP_POLL_S = 2.0
PLAIN_INTERVAL_S = 15.0

ENDS = ("failed", "cancelled", "ended early")
"""In place of a stage: how a trajectory ended that is not done."""


Report = Callable[[TrajectoryProgress], None]


class ProgressBoard:
    """The newest progress of every trajectory; a plain object, or held by an actor."""

    def __init__(self) -> None:
        self._newest: dict[tuple[str, bool], TrajectoryProgress] = {}

    def post(self, progress: TrajectoryProgress) -> None:
        """Record where a trajectory is now."""
        place = (progress.trajectory, progress.background)
        if progress.background and progress.finished:
            self._newest.pop(place, None)
        else:
            if progress.finished:
                self._newest.pop((progress.trajectory, True), None)
            self._newest[place] = merged(self._newest.get(place), progress, time.time())

    def snapshot(self) -> list[TrajectoryProgress]:
        """Return the newest progress of each trajectory, in the order of their ids.

        What goes on in the background follows the trajectory's own.
        """
        now = time.time()
        return [with_wait(self._newest[place], now) for place in sorted(self._newest)]


def with_wait(progress: TrajectoryProgress, time_s: float) -> TrajectoryProgress:
    """Return the progress with the wait that still goes on counted in."""
    if not progress.waits_for or progress.finished:
        return progress
    return replace(progress, waited_s=progress.waited_s + time_s - progress.waits_since)


def merged(before: TrajectoryProgress | None, now: TrajectoryProgress, time_s: float) -> TrajectoryProgress:
    """Return what is known after a report: it may be of counts alone, or from a worker with old counts."""
    if before is None:
        return replace(now, waits_since=time_s if now.waits_for else 0.0)
    waited_s = before.waited_s
    if now.finished and not now.stages_total:  # from one who knows of the end alone
        now = replace(before, stage=now.stage, finished=True, places=(), waits_for="")
    if now.key and before.key == now.key and not now.finished:
        if not now.started_at:
            return replace(before, stages_done=now.stages_done, stages_reused=now.stages_reused)
        if now.stages_done < before.stages_done:
            now = replace(now, stages_done=before.stages_done, stages_reused=before.stages_reused)
        if not (now.places or now.waits_for or before.waits_for):
            now = replace(now, places=before.places)
        if now.waits_for and before.waits_for:
            return replace(now, waits_since=before.waits_since, waited_s=waited_s)
    if before.waits_for:
        waited_s += time_s - before.waits_since
    return replace(now, waits_since=time_s if now.waits_for else 0.0, waited_s=waited_s)


def devices_in_use(places: Iterable[str]) -> int:
    """Return how many GPUs these places have, each counted once, or places where they have none."""
    gpus: set[tuple[str, str]] = set()
    without = 0
    for place in places:
        host, *on_it = place.split(" GPU ")
        gpus.update((host, gpu) for gpu in on_it)
        without += not on_it
    return len(gpus) + without


class RemoteReport:
    """Posts to a `ProgressBoard` held by a Ray actor; picklable, and never waits."""

    def __init__(self, board: Any):
        self._board = board

    def __call__(self, progress: TrajectoryProgress) -> None:
        self._board.post.remote(progress)


def never() -> bool:
    """Return that no stop is requested."""
    return False


class StageProgress:
    """The `ClusterProgress` of one stage: turns its counts into reports, a few a second at most."""

    def __init__(
        self,
        report: Report,
        progress: TrajectoryProgress,
        stopping: Callable[[], bool] = never,
    ):
        self._report = report
        self._stopping = stopping
        self._asked_at, self._stops = 0.0, False
        self._progress = replace(progress, started_at=time.time())
        self._posted_at = 0.0
        self._logged_at = time.time()
        self.waited_s = 0.0
        report(self._progress)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.time()
        if now - self._posted_at < POST_INTERVAL_S and done != total:
            return
        self._posted_at = now
        if now - self._logged_at > PLAIN_INTERVAL_S or done == total:
            self._logged_at = now
            log.info("%s: %d of %d %s", self._progress.stage, done, total, note)
        self._report(replace(self._progress, done=done, total=total, note=note, waits_for=""))

    def waits_for(self, reason: str) -> None:
        """Report what the stage waits for."""
        self._progress = replace(self._progress, waits_for=reason)
        self._report(self._progress)

    def runs_on(self, places: Sequence[str]) -> None:
        """Report where the stage runs now."""
        self._progress = replace(self._progress, waits_for="", places=tuple(places))
        self._report(self._progress)

    def waited(self, seconds: float) -> None:
        """Add up the seconds in which the stage had no place."""
        self.waited_s += seconds

    def stop_requested(self) -> bool:
        """Return whether the campaign is to stop; asks for it every few seconds."""
        if not self._stops and time.time() - self._asked_at >= STOP_POLL_S:
            self._asked_at = time.time()
            try:
                self._stops = self._stopping()
            except Exception as error:  # a coordinator that is being started again
                log.warning("whether to stop is not known for the moment: %s", error)
        return self._stops


@contextmanager
def live_view(
    snapshot: Callable[[], list[TrajectoryProgress]], stream: TextIO | None = None
) -> Iterator[None]:
    """Show the progress while the body runs: live in a terminal, plain lines otherwise."""
    console = Console(file=stream or sys.stderr)
    stop = threading.Event()
    show = _show_live if console.is_terminal else _show_lines
    thread = threading.Thread(target=show, args=(console, snapshot, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _show_live(
    console: Console, snapshot: Callable[[], list[TrajectoryProgress]], stop: threading.Event
) -> None:
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while not stop.wait(0.5):
            live.update(render(snapshot()))


def _show_lines(
    console: Console, snapshot: Callable[[], list[TrajectoryProgress]], stop: threading.Event
) -> None:
    """Print a line when a trajectory goes on to another stage, and now and then within a long one."""
    shown: dict[str, tuple[tuple[int, str, str], float]] = {}
    while not stop.wait(0.5):
        for progress in snapshot():
            if progress.background:
                continue
            place = (progress.iteration, progress.stage, progress.waits_for)
            before, when = shown.get(progress.trajectory, (None, 0.0))
            if place != before or time.time() - when > PLAIN_INTERVAL_S:
                shown[progress.trajectory] = (place, time.time())
                console.print(line(progress), markup=False, highlight=False, soft_wrap=True)


def line(progress: TrajectoryProgress) -> str:
    """Return where a trajectory is, as one plain line."""
    parts = [
        f"{progress.trajectory}: iteration {progress.iteration}/{progress.iterations}",
        f"stage {min(progress.stages_done + 1, progress.stages_total)}/{progress.stages_total}",
        progress.stage,
    ]
    if progress.waits_for:
        parts.append(f"waits for {progress.waits_for}")
    elif progress.total:
        parts.append(f"{progress.done}/{progress.total} {progress.note}".rstrip())
    return ", ".join(parts)


def shown_state(progress: TrajectoryProgress) -> str:
    """Return the stage that a trajectory is at, or how it ended."""
    if not progress.finished:
        return progress.stage
    return progress.stage if progress.stage in ENDS else "done"


def shown_count(progress: TrajectoryProgress) -> str:
    """Return how far the stage is, in its own units."""
    return f"{progress.done}/{progress.total} {progress.note}".rstrip() if progress.total else ""


def render(trajectories: list[TrajectoryProgress]) -> Group:
    """Render the progress for rich: a line a trajectory."""
    table = Table(box=None, pad_edge=False)
    for heading in ("trajectory", "iteration", "stages", "now", "", "", "since"):
        table.add_column(heading, style="bold" if heading == "trajectory" else "")
    for progress in trajectories:
        if progress.background:
            continue
        reused = f" ({progress.stages_reused} reused)" if progress.stages_reused else ""
        minutes, seconds = divmod(int(time.time() - progress.started_at), 60)
        table.add_row(
            progress.trajectory,
            f"{progress.iteration}/{progress.iterations}",
            f"{progress.stages_done}/{progress.stages_total}{reused}",
            shown_state(progress),
            ProgressBar(total=max(progress.total, 1), completed=progress.done, width=12),
            f"waits for {progress.waits_for}" if progress.waits_for else shown_count(progress),
            f"{minutes}:{seconds:02d}" if progress.started_at else "",
        )
    return Group(table, Text("Ctrl-C ends in good order; --resume continues.", style="dim"))
