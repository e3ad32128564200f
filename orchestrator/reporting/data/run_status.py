"""Where every trajectory of a run is: what runs, where, since when; what waits, and for what; what failed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.storage.control import Control
from orchestrator.storage.layout import stage_log
from orchestrator.storage.run_progress import Overview, RunProgress, TrajectoryProgress
from orchestrator.storage.trajectory_status import TrajectoryStatus

SILENT_S = 90.0
"""A driver that has written nothing for so long has ended, or is cut off from the storage."""

RunState = Literal["running", "paused", "ended", "silent", "not started"]
TrajectoryState = Literal[
    "running", "waiting", "failed", "cancelled", "stopped", "interrupted", "not started", "done"
]
ORDER: tuple[TrajectoryState, ...] = (
    "running", "waiting", "failed", "cancelled", "stopped", "interrupted", "not started", "done",
)  # fmt: skip
"""In which trajectories are shown: what an operator has to look at comes first."""


@dataclass(frozen=True)
class Activity:
    """A stage that is at work or waits; times are seconds since the epoch, and `log` is its log's name."""

    stage: str
    iteration: int
    started_at: float
    done: int
    total: int
    note: str
    places: Sequence[str]
    waits_for: str
    waits_since: float
    background: bool
    log: str
    phase: str = ""
    restarted: str = ""


@dataclass(frozen=True)
class TrajectoryView:
    """Where one trajectory is, or how it ended: `reason`, and the `log` of the stage that failed.

    `measured` is a number of the newest measured model, by its name.
    """

    trajectory: str
    state: TrajectoryState
    iteration: int = 0
    iterations: int = 0
    stages_done: int = 0
    stages_total: int = 0
    stages_reused: int = 0
    waited_s: float = 0.0
    activities: Sequence[Activity] = ()
    reason: str = ""
    log: str = ""
    perplexities: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunStatus:
    """Where a run is, as its driver on `host` wrote it `age_s` seconds ago."""

    state: RunState
    host: str
    written_at: float
    age_s: float
    paused: bool
    trajectories: Sequence[TrajectoryView]
    overview: Overview | None = None

    @property
    def counts(self) -> Mapping[TrajectoryState, int]:
        """The number of trajectories in each state."""
        return Counter(each.state for each in self.trajectories)


def run_status(
    planned: Mapping[str, int],
    statuses: Mapping[str, TrajectoryStatus],
    saved: RunProgress | None,
    control: Control,
    now: float,
) -> RunStatus:
    """Return where a run is.

    Args:
        planned: iterations of each trajectory of the run.
        statuses: how trajectories ended.
        saved: what the driver wrote last, if it has written anything.
        control: what an operator wants.
        now: seconds since the epoch.
    """
    age_s = max(0.0, now - saved.written_at) if saved else 0.0
    state: RunState = "not started"
    if saved is not None:
        state = "ended" if saved.ended else "silent" if age_s > SILENT_S else "running"
        if state == "running" and control.paused:
            state = "paused"
    goes_on = state in ("running", "paused")
    reported: dict[str, list[TrajectoryProgress]] = {}
    for progress in saved.trajectories if saved else ():
        reported.setdefault(progress.trajectory, []).append(progress)
    views = [
        _view(
            trajectory,
            planned.get(trajectory, 0),
            statuses.get(trajectory),
            reported.get(trajectory, ()),
            goes_on,
            trajectory in control.cancelled,
        )
        for trajectory in dict.fromkeys((*planned, *reported))
    ]
    views.sort(key=lambda view: ORDER.index(view.state))
    return RunStatus(
        state,
        saved.host if saved else "",
        saved.written_at if saved else 0.0,
        age_s,
        control.paused,
        tuple(views),
        saved.overview if saved else None,
    )


def _view(
    trajectory: str,
    iterations: int,
    status: TrajectoryStatus | None,
    reported: Sequence[TrajectoryProgress],
    goes_on: bool,
    cancelled: bool,
) -> TrajectoryView:
    own = next((each for each in reported if not each.background), None)
    under_way = [each for each in reported if not each.finished and each.key]
    if status is not None and status.state == "cancelled" and not cancelled:
        status = None  # an operator has let it go on, and nobody has resumed it yet
    at_work = goes_on and own is not None and not own.finished
    state: TrajectoryState = "not started"
    if at_work:
        state = "waiting" if under_way and all(each.waits_for for each in under_way) else "running"
    elif cancelled:
        state = "cancelled"
    elif status is not None:
        state = status.state
    elif own is not None:
        state = _ended_as(own)
    ended = status if status is not None and not at_work else None
    return TrajectoryView(
        trajectory,
        state,
        iteration=own.iteration if own else 0,
        iterations=own.iterations if own else iterations,
        stages_done=own.stages_done if own else 0,
        stages_total=own.stages_total if own else 0,
        stages_reused=own.stages_reused if own else 0,
        waited_s=own.waited_s if own else 0.0,
        activities=tuple(map(_activity, under_way)) if at_work else (),
        reason=ended.reason if ended else own.note if own and own.finished else "",
        log=ended.log if ended else "",
        perplexities=own.perplexities if own else {},
        measured=own.measured if own else {},
    )


def _ended_as(progress: TrajectoryProgress) -> TrajectoryState:
    """Return the state of a trajectory of which no more is known than its last report."""
    if not progress.finished or progress.stage in ("ended early", "cancelled"):
        return "interrupted"  # a cancellation that holds is known to the caller
    return "failed" if progress.stage == "failed" else "done"


def _activity(progress: TrajectoryProgress) -> Activity:
    return Activity(
        progress.stage,
        progress.iteration,
        progress.started_at,
        progress.done,
        progress.total,
        progress.note,
        tuple(progress.places),
        progress.waits_for,
        progress.waits_since,
        progress.background,
        stage_log(progress.trajectory, progress.iteration, progress.stage, progress.key),
        progress.phase,
        progress.restarted,
    )
