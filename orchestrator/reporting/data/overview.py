"""How far a campaign is as a whole: how many of its stages are finished, and how long the rest may take."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from orchestrator.planning.stages import PlannedStage
from orchestrator.storage.run_progress import Overview, TrajectoryProgress

SHORT = ("prune", "export")
"""Kinds of stages that take little: counted as nothing as long as none has been finished."""

COUNTED = ("score", "generate", "teach", "recover")
"""Kinds of stages that count all their work, so that a part of it tells how long the whole takes."""

ENOUGH = 0.1
"""That part."""

Name = tuple[str, str]
"""Kind and key of a stage."""


def overview(
    planned: Mapping[str, Sequence[PlannedStage]],
    started_at: float,
    trajectories: Sequence[TrajectoryProgress],
    now: float | None = None,
) -> Overview:
    """Return how far the campaign is.

    A stage is expected to take as long as others of its kind took, which is rough where methods differ, and
    as many to be at work as are now.

    Args:
        planned: the stages of each trajectory, by its id, as a dry run found them at the start.
        started_at: when the driver began, in seconds since the epoch.
        trajectories: where those are that have begun.
        now: the time; that of the call if None.
    """
    now = time.time() if now is None else now
    own = {each.trajectory: each for each in trajectories if not each.background}
    at_work = [each for each in trajectories if each.key and not each.finished and not each.waits_for]
    left = {name: list(_left(stages, own.get(name))) for name, stages in planned.items()}
    every = {(stage.kind, stage.key) for stages in planned.values() for stage in stages}
    done = {(stage.kind, stage.key) for stages in planned.values() for stage in stages if stage.finished}
    for name, stages in planned.items():
        done |= {(stage.kind, stage.key) for stage in stages} - set(left[name])
    # What a trajectory has not passed that has ended is never run.
    to_run = {
        name: [stage for stage in stages if stage not in done]
        for name, stages in left.items()
        if name not in own or not own[name].finished
    }
    takes = _seconds_each(list(own.values()), at_work, now)
    unknown = next((kind for stages in to_run.values() for kind, _ in stages if kind not in takes), "")
    if unknown:
        return Overview(len(done), len(every), started_at, unknown=unknown)
    passed: dict[str, float] = defaultdict(float)  # seconds of the stages at work, by trajectory
    work_s = sum(takes[kind] for kind, _ in {stage for stages in to_run.values() for stage in stages})
    for each in at_work:
        seconds = min(now - each.started_at, takes.get(each.stage, 0.0))
        work_s -= seconds
        passed[each.trajectory] += 0 if each.stage == "evaluate" else seconds
    # An evaluation may go on beside the next stage; the others of a trajectory follow one another.
    chains = [
        sum(takes[kind] for kind, _ in stages if kind != "evaluate") - passed[name]
        for name, stages in to_run.items()
    ]
    left_s = max(work_s / max(1, len(at_work)), *chains, 0.0)
    return Overview(len(done), len(every), started_at, left_s)


def _left(stages: Sequence[PlannedStage], progress: TrajectoryProgress | None) -> Iterator[Name]:
    """Yield the stages that a trajectory has not passed; it passes those of a kind in their order."""
    passed = Counter(progress.kinds_done if progress else {})
    for stage in stages:
        if passed[stage.kind]:
            passed[stage.kind] -= 1
        else:
            yield stage.kind, stage.key


def _seconds_each(
    trajectories: Sequence[TrajectoryProgress], at_work: Sequence[TrajectoryProgress], now: float
) -> dict[str, float]:
    """Return how long a stage of each kind takes: as finished ones did, or as one at work lets expect."""
    takes = dict.fromkeys(SHORT, 0.0)
    for each in at_work:
        if each.stage in COUNTED and each.total and each.done >= ENOUGH * each.total:
            takes[each.stage] = (now - each.started_at) * each.total / each.done
    counts, seconds = Counter[str](), Counter[str]()
    for each in trajectories:
        counts.update(each.kinds_done)
        seconds.update(each.seconds_of)  # type: ignore[arg-type]
    return takes | {kind: seconds[kind] / count for kind, count in counts.items()}
