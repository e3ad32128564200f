"""How far trajectories are: a `ProgressBoard` that their stages report to."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.storage.run_progress import TrajectoryProgress

log = logging.getLogger(__name__)

POST_INTERVAL_S = 0.3
STOP_POLL_S = 2.0
LOG_INTERVAL_S = 15.0

Report = Callable[[TrajectoryProgress], None]


class ProgressBoard:
    """The newest progress of every trajectory; a plain object, or held by an actor."""

    def __init__(self) -> None:
        self._newest: dict[tuple[str, bool], TrajectoryProgress] = {}
        self._ended_at: dict[tuple[str, str], float] = {}

    def post(self, progress: TrajectoryProgress) -> None:
        """Record where a trajectory is now."""
        place, stage = (progress.trajectory, progress.background), (progress.trajectory, progress.key)
        if 0 < progress.started_at < self._ended_at.get(stage, 0.0):
            return  # a worker's report that arrives after the end of its stage
        before = self._newest.get(place)
        if before is not None and before.key and (progress.finished or progress.key != before.key):
            self._ended_at[before.trajectory, before.key] = time.time()
        if progress.background and progress.finished:
            self._newest.pop(place, None)
        else:
            if progress.finished:
                self._newest.pop((progress.trajectory, True), None)
            self._newest[place] = merged(before, progress, time.time())

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
        now = replace(before, stage=now.stage, note=now.note, finished=True, places=(), waits_for="")
    if now.stages_done <= before.stages_done:  # older, or of a trajectory that passes its stages once more
        now = replace(
            now,
            stages_done=before.stages_done,
            stages_reused=before.stages_reused,
            kinds_done=before.kinds_done,
            seconds_of=before.seconds_of,
        )
    now = replace(
        now,
        stages_total=now.stages_total or before.stages_total,
        perplexities=now.perplexities or before.perplexities,
        measured=now.measured or before.measured,
    )
    if now.key and before.key == now.key and not now.finished:
        if not (now.started_at or now.waits_for):  # of counts alone
            counts = ("stages_done", "stages_reused", "kinds_done", "seconds_of", "perplexities", "measured")
            return replace(before, **{name: getattr(now, name) for name in counts})
        now = replace(now, restarted=now.restarted or before.restarted)
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
        if not self._progress.counted_since:
            self._progress = replace(self._progress, counted_from=done, counted_since=now)
        if now - self._posted_at < POST_INTERVAL_S and done != total:
            return
        self._posted_at = now
        if now - self._logged_at > LOG_INTERVAL_S or done == total:
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

    def restarted(self, what: str) -> None:
        """Report that what was lost is started again; goes on to be shown until the stage ends."""
        self._progress = replace(self._progress, restarted=what)
        self._report(self._progress)

    def stop_requested(self) -> bool:
        """Return whether the campaign is to stop; asks for it every few seconds."""
        if not self._stops and time.time() - self._asked_at >= STOP_POLL_S:
            self._asked_at = time.time()
            try:
                self._stops = self._stopping()
            except Exception as error:  # a coordinator that is being started again
                log.warning("whether to stop is not known for the moment: %s", error)
        return self._stops
