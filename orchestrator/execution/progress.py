"""How far a campaign is: a `ProgressBoard` that stages report to, and the live view of it in a terminal."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

log = logging.getLogger(__name__)

POST_INTERVAL_S = 0.3
STOP_POLL_S = 2.0
PLAIN_INTERVAL_S = 15.0


@dataclass(frozen=True)
class TrajectoryProgress:
    """Where one trajectory is.

    Attributes:
        key: of the stage that it is at.
        waits_for: what the stage waits for; nothing while it runs.
        places: where the stage runs, one an actor or worker.
        perplexities: of the newest measured model, by text.
    """

    trajectory: str
    iteration: int
    iterations: int
    stage: str
    done: int = 0
    total: int = 0
    note: str = ""
    started_at: float = 0.0
    finished: bool = False
    key: str = ""
    waits_for: str = ""
    places: Sequence[str] = ()
    stages_done: int = 0
    stages_total: int = 0
    stages_reused: int = 0
    perplexities: Mapping[str, float] = field(default_factory=dict)


Report = Callable[[TrajectoryProgress], None]


class ProgressBoard:
    """The newest progress of every trajectory; a plain object, or held by an actor."""

    def __init__(self) -> None:
        self._newest: dict[str, TrajectoryProgress] = {}

    def post(self, progress: TrajectoryProgress) -> None:
        """Record where a trajectory is now."""
        self._newest[progress.trajectory] = progress

    def snapshot(self) -> list[TrajectoryProgress]:
        """Return the newest progress of each trajectory, in the order of their ids."""
        return [self._newest[name] for name in sorted(self._newest)]


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
        self.waited_s = 0.0
        report(self._progress)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.time()
        if now - self._posted_at < POST_INTERVAL_S and done != total:
            return
        self._posted_at = now
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


def unreported(progress: TrajectoryProgress) -> None:
    """Report nothing: of what goes on in the background, beside what the trajectory waits for."""


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
    shown: dict[str, tuple[tuple[int, str], float]] = {}
    while not stop.wait(0.5):
        for progress in snapshot():
            place = (progress.iteration, progress.stage)
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
    if progress.total:
        parts.append(f"{progress.done}/{progress.total} {progress.note}".rstrip())
    return ", ".join(parts)


def render(trajectories: list[TrajectoryProgress]) -> Group:
    """Render the progress for rich: a line a trajectory."""
    table = Table(box=None, pad_edge=False)
    for heading in ("trajectory", "iteration", "stages", "now", "", "", "since"):
        table.add_column(heading, style="bold" if heading == "trajectory" else "")
    for progress in trajectories:
        reused = f" ({progress.stages_reused} reused)" if progress.stages_reused else ""
        minutes, seconds = divmod(int(time.time() - progress.started_at), 60)
        table.add_row(
            progress.trajectory,
            f"{progress.iteration}/{progress.iterations}",
            f"{progress.stages_done}/{progress.stages_total}{reused}",
            "done" if progress.finished else progress.stage,
            ProgressBar(total=max(progress.total, 1), completed=progress.done, width=12),
            f"{progress.done}/{progress.total} {progress.note}" if progress.total else "",
            f"{minutes}:{seconds:02d}" if progress.started_at else "",
        )
    return Group(table, Text("Ctrl-C ends in good order; --resume continues.", style="dim"))
