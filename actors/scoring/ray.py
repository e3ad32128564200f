"""Scoring on Ray: a pool of actors that share the calibration sequences, and the candidates if need be."""

from functools import partial
from typing import TYPE_CHECKING

import ray

from actors.contracts import Progress, ScoreResult, ScoreSpec, no_progress
from actors.ray_pool import placement, pool_of, result_of, share_out, wait_for_place

if TYPE_CHECKING:
    from actors.scoring.score import Share, ShareScores

SHARES_PER_ACTOR = 4
"""More shares than actors, so that a fast actor takes over from a slow or lost one."""


class ScoreActor:
    """Scores shares of one spec; holds its models between shares."""

    def __init__(self, spec: ScoreSpec):
        from actors.scoring.score import Scorer

        self._scorer = Scorer(spec)

    def ready(self) -> bool:
        """Answers once the actor has been placed."""
        return True

    def work(self, share: "Share") -> "ShareScores":
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
    from actors.scoring.laco import merge_result
    from actors.scoring.score import Scorer, conduct

    scorer = Scorer(spec)
    if scorer.criterion.by_merge:
        task = ray.remote(merge_result).options(**placement(cpus, gpus), max_retries=3)
        return result_of(task.remote(spec))
    remote = ray.remote(ScoreActor).options(**placement(cpus, gpus), max_restarts=3)
    with pool_of(actors, partial(remote.remote, spec)) as pool:
        wait_for_place([actor.ready.remote() for actor in pool], "scoring", cpus, gpus, start_timeout_s)
        # A share reads a streamed model's files once, so there are no more than actors.
        count = actors if spec.stream_weights else actors * SHARES_PER_ACTOR
        return conduct(
            scorer, partial(share_out, pool, what="score"), count, at_least=actors, progress=progress
        )
