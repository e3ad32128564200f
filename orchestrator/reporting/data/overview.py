"""How far a campaign is as a whole: how many of its stages are finished, and how long the rest may take."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from orchestrator.planning.stages import PlannedStage
from orchestrator.storage.run_progress import Overview, TrajectoryProgress

SHORT = ("prune", "export")
"""Kinds of stages that take little: counted as nothing as long as none has been finished."""

COUNTED = ("score", "generate", "teach", "recover")
"""Kinds of stages that count all their work, so that a part of it tells how long the whole takes."""

ENOUGH = 0.05
"""That part, of what was left to do when it began to count."""

Name = tuple[str, str]
"""Kind and key of a stage."""

NOTHING: tuple[list[Name], list[Name]] = ([], [])
"""Of a trajectory without planned stages: none passed, none left."""


def overview(
    planned: Mapping[str, Sequence[PlannedStage]],
    expected: Mapping[Name, float],
    started_at: float,
    trajectories: Sequence[TrajectoryProgress],
    now: float | None = None,
) -> Overview:
    """Return how far the campaign is.

    Stages of a kind are expected to take as long as finished ones took, by the ratio of what the plan
    expects of them, and as many to be at work as are now. One that is at work tells of itself.

    Args:
        planned: the stages of each trajectory, by its id, as a dry run found them at the start.
        expected: seconds that the plan expects of a stage, right but for a factor that its kind shares.
        started_at: when the driver began, in seconds since the epoch.
        trajectories: where those are that have begun.
        now: the time; that of the call if None.
    """
    now = time.time() if now is None else now
    own = {each.trajectory: each for each in trajectories if not each.background}
    ways = {name: _way(stages, own.get(name)) for name, stages in planned.items()}
    every = {(stage.kind, stage.key) for stages in planned.values() for stage in stages}
    done = {(stage.kind, stage.key) for stages in planned.values() for stage in stages if stage.finished}
    done |= {stage for passed, _ in ways.values() for stage in passed}
    # What a trajectory has not passed that has ended is never run.
    to_run = {
        name: [stage for stage in left if stage not in done]
        for name, (_, left) in ways.items()
        if name not in own or not own[name].finished
    }
    at_work = [
        (each, stage)
        for each in trajectories
        if each.key and not each.finished and not each.waits_for
        for stage in _first(each.stage, ways.get(each.trajectory, NOTHING)[1])
    ]
    known = {stage: total for each, stage in at_work if (total := _total_s(each, now))}
    pace = _pace(own.values(), ways, expected, known)
    unknown = next((kind for stages in to_run.values() for kind, _ in stages if kind not in pace), "")
    if unknown:
        return Overview(len(done), len(every), started_at, unknown=unknown)

    def takes(stage: Name) -> float:
        return known.get(stage, pace.get(stage[0], 0.0) * (expected.get(stage) or 1.0))

    gone: dict[str, float] = defaultdict(float)  # seconds of the stages at work, by trajectory
    work_s = sum(takes(stage) for stage in {stage for stages in to_run.values() for stage in stages})
    for each, stage in at_work:
        seconds = min(now - each.started_at, takes(stage))
        work_s -= seconds
        gone[each.trajectory] += 0 if each.stage == "evaluate" else seconds
    # An evaluation may go on beside the next stage; the others of a trajectory follow one another.
    chains = [
        sum(takes(stage) for stage in stages if stage[0] != "evaluate") - gone[name]
        for name, stages in to_run.items()
    ]
    left_s = max(work_s / max(1, len(at_work)), *chains, 0.0)
    return Overview(len(done), len(every), started_at, left_s)


def _way(
    stages: Sequence[PlannedStage], progress: TrajectoryProgress | None
) -> tuple[list[Name], list[Name]]:
    """Return the stages that a trajectory has passed and those that it has not, each kind in its order."""
    counts = Counter(progress.kinds_done if progress else {})
    passed: list[Name] = []
    left: list[Name] = []
    for stage in stages:
        (passed if counts[stage.kind] > 0 else left).append((stage.kind, stage.key))
        counts[stage.kind] -= 1
    return passed, left


def _first(kind: str, stages: Sequence[Name]) -> list[Name]:
    """Return the first stage of a kind, if there is one: at work, its key may differ from the plan's."""
    return [stage for stage in stages if stage[0] == kind][:1]


def _total_s(progress: TrajectoryProgress, now: float) -> float | None:
    """Return how long a stage at work will have taken, if so much of it is done that it can be told.

    It goes on as since its first count: not from its start, as processes start before that, and of a stage
    that was interrupted a part is done already.
    """
    done, to_do = progress.done - progress.counted_from, progress.total - progress.counted_from
    since = progress.counted_since or progress.started_at
    if progress.stage in COUNTED and progress.total and done > 0 and done >= ENOUGH * to_do:
        return since - progress.started_at + (now - since) * to_do / done
    return None


def _pace(
    trajectories: Iterable[TrajectoryProgress],
    ways: Mapping[str, tuple[Sequence[Name], Sequence[Name]]],
    expected: Mapping[Name, float],
    known: Mapping[Name, float],
) -> dict[str, float]:
    """Return what stages of each kind take, over what is expected: finished ones, else one at work."""
    pace = dict.fromkeys(SHORT, 0.0)
    pace |= {stage[0]: total_s / (expected.get(stage) or 1.0) for stage, total_s in known.items()}
    took, of_plan = Counter[str](), Counter[str]()
    for each in trajectories:
        took.update(each.seconds_of)  # type: ignore[arg-type]
        for stage in ways.get(each.trajectory, NOTHING)[0]:
            of_plan[stage[0]] += expected.get(stage) or 1.0  # type: ignore[assignment]
    return pace | {kind: took[kind] / seconds for kind, seconds in of_plan.items()}
