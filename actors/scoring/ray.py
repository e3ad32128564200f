"""Scoring on Ray: one actor scores all, or a pool divides the calibration sequences and the candidates."""

from dataclasses import replace
from typing import TYPE_CHECKING

from actors.contracts import MERGING_CRITERIA, ActorPoolSpec, Progress, ScoreResult, ScoreSpec, no_progress
from actors.out_of_memory import once_more_with_less
from actors.ray_pool import ActorPool, run_in_task, task_name
from actors.scoring.memory_shares import memory_shares

if TYPE_CHECKING:
    from actors.scoring.score import Scorer, Shard, ShardScores

SHARDS_PER_ACTOR = 4
"""More shards than actors, so that a fast actor takes over from a slow or lost one."""


class ScoreActor:
    """Scores what one spec says; holds its models between shards."""

    def __init__(self, spec: ScoreSpec, memory_share: float = 1.0):
        self._spec, self._memory_share = spec, memory_share
        self._scorer: Scorer | None = None

    def work(self, shard: "Shard") -> "ShardScores":
        """Return the scores of the shard's candidates on its sequences."""
        if self._scorer is None:
            from actors.scoring.score import Scorer

            # Not made with the actor: Ray would report its death instead of what is wrong.
            self._scorer = Scorer(self._spec, self._memory_share)
        return self._scorer.score(shard)

    def score_all(self, progress: Progress = no_progress) -> ScoreResult:
        """Return the result of the whole spec; `progress` crosses to the actor's process."""
        from actors.scoring.score import score_in_process

        return score_in_process(self._spec, self._memory_share, progress)


def score_on_ray(spec: ScoreSpec, pool: ActorPoolSpec, progress: Progress = no_progress) -> ScoreResult:
    """Score on as many actors as the pool has, or on one where the work cannot be divided.

    Merges are tried one upon another, and layers by hand need no model. One actor does all by itself;
    what divides the work among several loads as much as they do, and has a process of its own.

    Raises:
        WorkError: no actor got a place in time, or all were lost.
        MemoryExhaustedError: memory does not suffice, with half of the budget neither.
    """
    if pool.actors > 1 and spec.criterion not in MERGING_CRITERIA and not spec.layers:
        return run_in_task(score_on_pool, spec, pool, progress=progress)
    pool = replace(pool, actors=1)

    def score(memory_share: float) -> ScoreResult:
        with ActorPool(pool, ScoreActor, spec, memory_share, setting="scoring", progress=progress) as actors:
            ((_, result),) = actors.dispatch(
                [spec], submit=lambda actor, _: actor.score_all.options(**task_name()).remote(progress)
            )
            return result

    return once_more_with_less(score, **memory_shares(spec))


def score_on_pool(spec: ScoreSpec, pool: ActorPoolSpec, progress: Progress = no_progress) -> ScoreResult:
    """Divide the scoring among the actors of a pool; begin as soon as one of them has a place.

    A shard whose actor is lost goes to another; the others are not run again.
    All actors have ended when this returns, so that training can have their place.

    Raises:
        WorkError, MemoryExhaustedError: as `score_on_ray`.
    """
    from actors.scoring.score import Scorer, run_shards

    # A shard reads a streamed model's files once, so there are no more than actors.
    count = pool.actors if spec.stream_weights else pool.actors * SHARDS_PER_ACTOR

    def score(memory_share: float) -> ScoreResult:
        with ActorPool(pool, ScoreActor, spec, memory_share, setting="scoring", progress=progress) as actors:
            return run_shards(Scorer(spec), actors.dispatch, count, at_least=pool.actors, progress=progress)

    return once_more_with_less(score, **memory_shares(spec))
