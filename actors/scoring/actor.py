"""Scoring on Ray: a pool of actors that share the calibration sequences."""

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from actors.contracts import Progress, ScoreResult, ScoreSpec, no_progress
from actors.errors import WorkError
from actors.models.actor import placement, result_of, wait_for_place
from actors.scoring.merge import merge_result
from actors.scoring.score import Scorer, ScoreRows

log = logging.getLogger(__name__)

SHARES_PER_ACTOR = 4
"""More shares than actors, so that a fast actor takes over from a slow or lost one."""


class ScoreActor:
    """Scores shares of one spec's calibration sequences; holds its models between shares."""

    def __init__(self, spec: ScoreSpec):
        self._scorer = Scorer(spec)

    def ready(self) -> bool:
        """Answers once the actor has been placed."""
        return True

    def score(self, positions: list[int]) -> ScoreRows:
        """Score rows of the sequences at `positions`."""
        return self._scorer.score(positions)


def score_on_ray(
    spec: ScoreSpec,
    *,
    actors: int,
    cpus: float,
    gpus: float,
    start_timeout_s: float,
    progress: Progress = no_progress,
) -> ScoreResult:
    """Score on a pool of up to `actors` actors; begins as soon as one of them has a place.

    Merges are tried one upon another and so are one task on one actor's place.
    A share whose actor is lost goes to another; the others are not run again.
    All actors are gone when this returns, so that training can have their place.

    Raises:
        WorkError: no actor got a place within `start_timeout_s`, or all were lost.
    """
    scorer = Scorer(spec)
    if scorer.criterion.by_merge:
        task = ray.remote(merge_result).options(**placement(cpus, gpus), max_retries=3)
        return result_of(task.remote(spec))
    with _pool(spec, actors, cpus, gpus) as pool:
        wait_for_place([actor.ready.remote() for actor in pool], "scoring", cpus, gpus, start_timeout_s)
        rows = _share_out(pool, scorer.shares(len(pool) * SHARES_PER_ACTOR), progress)
    return scorer.result(rows)


@contextmanager
def _pool(spec: ScoreSpec, actors: int, cpus: float, gpus: float) -> Iterator[list[ActorHandle]]:
    remote = ray.remote(ScoreActor).options(**placement(cpus, gpus), max_restarts=3)
    pool = [remote.remote(spec) for _ in range(actors)]
    try:
        yield pool
    finally:
        for actor in pool:
            ray.kill(actor)


def _share_out(
    pool: list[ActorHandle], shares: list[list[int]], progress: Progress
) -> dict[int, list[float]]:
    """Give every actor a share as soon as it is free, until all shares are scored."""
    todo = deque(shares)
    idle: list[ActorHandle] = []
    pending: dict[Any, tuple[ActorHandle, list[int]]] = {actor.ready.remote(): (actor, []) for actor in pool}
    rows: dict[int, list[float]] = {}
    total = sum(len(share) for share in shares)
    while len(rows) < total:
        while idle and todo:
            actor, share = idle.pop(), todo.popleft()
            pending[actor.score.remote(share)] = (actor, share)
        if not pending:
            raise WorkError(f"all {len(pool)} score actors were lost; see the run's logs, then use --resume")
        (done,), _ = ray.wait(list(pending), num_returns=1)
        actor, share = pending.pop(done)
        try:
            answer = result_of(done)
        except RayActorError as error:
            # Only the lost share is run again. An actor that may come back is asked; a dead one is forgotten.
            if share:
                log.warning("a score actor was lost (%s); its %d sequences go to another", error, len(share))
                todo.append(share)
                pending[actor.ready.remote()] = (actor, [])
            continue
        if share:
            rows.update(zip(share, answer, strict=True))
            progress(len(rows), total, "sequences")
        idle.append(actor)
    return rows
