"""How far a campaign is: a board that stages report to, and the live view of it in a terminal."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

POST_INTERVAL_S = 0.3
PLAIN_INTERVAL_S = 15.0


@dataclass(frozen=True)
class Activity:
    """What one trajectory is doing. `perplexities` are of the newest measured model, by text."""

    trajectory: str
    iteration: int
    iterations: int
    stage: str
    done: int = 0
    total: int = 0
    note: str = ""
    started_at: float = 0.0
    finished: bool = False
    stages_done: int = 0
    stages_total: int = 0
    stages_reused: int = 0
    perplexities: Mapping[str, float] = field(default_factory=dict)


Report = Callable[[Activity], None]


class Board:
    """The newest activity of every trajectory; a plain object, or held by an actor."""

    def __init__(self) -> None:
        self._activities: dict[str, Activity] = {}

    def post(self, activity: Activity) -> None:
        """Note what a trajectory is doing now."""
        self._activities[activity.trajectory] = activity

    def snapshot(self) -> list[Activity]:
        """The newest activity of each trajectory, in the order of their ids."""
        return [self._activities[name] for name in sorted(self._activities)]


class RemoteReport:
    """Posts to a board that lives in a Ray actor; picklable, and never waits."""

    def __init__(self, board: Any):
        self._board = board

    def __call__(self, activity: Activity) -> None:
        self._board.post.remote(activity)


class StageProgress:
    """The `Progress` of one stage: turns its counts into reports, a few a second at most."""

    def __init__(self, report: Report, activity: Activity):
        self._report = report
        self._activity = replace(activity, started_at=time.time())
        self._posted_at = 0.0
        report(self._activity)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.time()
        if now - self._posted_at < POST_INTERVAL_S and done != total:
            return
        self._posted_at = now
        self._report(replace(self._activity, done=done, total=total, note=note))


@contextmanager
def live_view(snapshot: Callable[[], list[Activity]], stream: TextIO | None = None) -> Iterator[None]:
    """Show the board while the body runs: live in a terminal, plain lines elsewhere."""
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


def _show_live(console: Console, snapshot: Callable[[], list[Activity]], stop: threading.Event) -> None:
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while not stop.wait(0.5):
            live.update(render(snapshot()))


def _show_lines(console: Console, snapshot: Callable[[], list[Activity]], stop: threading.Event) -> None:
    """One line when a trajectory goes on to another stage, and now and then within a long one."""
    shown: dict[str, tuple[tuple[int, str], float]] = {}
    while not stop.wait(0.5):
        for activity in snapshot():
            place = (activity.iteration, activity.stage)
            before, when = shown.get(activity.trajectory, (None, 0.0))
            if place != before or time.time() - when > PLAIN_INTERVAL_S:
                shown[activity.trajectory] = (place, time.time())
                console.print(line(activity), markup=False, highlight=False, soft_wrap=True)


def line(activity: Activity) -> str:
    """An activity as one plain line."""
    parts = [
        f"{activity.trajectory}: iteration {activity.iteration}/{activity.iterations}",
        f"stage {min(activity.stages_done + 1, activity.stages_total)}/{activity.stages_total}",
        activity.stage,
    ]
    if activity.total:
        parts.append(f"{activity.done}/{activity.total} {activity.note}".rstrip())
    return ", ".join(parts)


def render(activities: list[Activity]) -> Group:
    """The board as a rich renderable: a line a trajectory."""
    table = Table(box=None, pad_edge=False)
    for heading in ("trajectory", "iteration", "stages", "now", "", "", "since"):
        table.add_column(heading, style="bold" if heading == "trajectory" else "")
    for activity in activities:
        reused = f" ({activity.stages_reused} reused)" if activity.stages_reused else ""
        table.add_row(
            activity.trajectory,
            f"{activity.iteration}/{activity.iterations}",
            f"{activity.stages_done}/{activity.stages_total}{reused}",
            "done" if activity.finished else activity.stage,
            ProgressBar(total=max(activity.total, 1), completed=activity.done, width=12),
            f"{activity.done}/{activity.total} {activity.note}" if activity.total else "",
            _duration(time.time() - activity.started_at) if activity.started_at else "",
        )
    return Group(table, Text("Ctrl-C ends in good order; --resume continues.", style="dim"))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
