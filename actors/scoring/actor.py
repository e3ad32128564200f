"""Scoring on Ray: a pool of actors that share the calibration sequences, and the candidates if need be."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError

from actors.contracts import Progress, ScoreResult, ScoreSpec, no_progress
from actors.errors import WorkError
from actors.models.actor import placement, result_of, wait_for_place
from actors.scoring.merge import merge_result
from actors.scoring.score import Scorer, Share, ShareScores, conduct

log = logging.getLogger(__name__)

SHARES_PER_ACTOR = 4
"""More shares than actors, so that a fast actor takes over from a slow or lost one."""

RETRY_S = 0.5
"""Pause before an actor that does not answer is asked again."""


class ScoreActor:
    """Scores shares of one spec; holds its models between shares."""

    def __init__(self, spec: ScoreSpec):
        self._scorer = Scorer(spec)

    def ready(self) -> bool:
        """Answers once the actor has been placed."""
        return True

    def score(self, share: Share) -> ShareScores:
        """Scores of the share's candidates on its sequences."""
        return self._scorer.score(share)


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
        # A share reads a streamed model's files once, so there are no more than actors.
        count = actors if spec.stream_weights else actors * SHARES_PER_ACTOR
        return conduct(scorer, partial(_share_out, pool), count, at_least=actors, progress=progress)


@contextmanager
def _pool(spec: ScoreSpec, actors: int, cpus: float, gpus: float) -> Iterator[list[ActorHandle]]:
    remote = ray.remote(ScoreActor).options(**placement(cpus, gpus), max_restarts=3)
    pool = [remote.remote(spec) for _ in range(actors)]
    try:
        yield pool
    finally:
        for actor in pool:
            ray.kill(actor)


def _share_out(pool: list[ActorHandle], shares: list[Share]) -> Iterator[tuple[Share, ShareScores]]:
    """Give every actor a share as soon as it is free, until all shares are scored."""
    todo = deque(shares)
    idle: list[ActorHandle] = []
    pending: dict[Any, tuple[ActorHandle, Share | None]] = {
        actor.ready.remote(): (actor, None) for actor in pool
    }
    left = len(shares)
    while left:
        while idle and todo:
            actor, share = idle.pop(), todo.popleft()
            pending[actor.score.remote(share)] = (actor, share)
        if not pending:
            raise WorkError(f"all {len(pool)} score actors were lost; see the run's logs, then use --resume")
        (done,), _ = ray.wait(list(pending), num_returns=1)
        actor, given = pending.pop(done)
        try:
            answer = result_of(done)
        except RayActorError as error:
            # Only the lost share is run again. An actor that may come back is asked; a dead one is forgotten.
            if given:
                log.warning("a score actor was lost (%s); its share goes to another", error)
                todo.append(given)
            if isinstance(error, ActorUnavailableError):
                # Its process is gone and Ray has not noticed yet: asked at once, it would say the same.
                time.sleep(RETRY_S)
            if given or isinstance(error, ActorUnavailableError):
                pending[actor.ready.remote()] = (actor, None)
            continue
        idle.append(actor)
        if given:
            left -= 1
            yield given, answer
