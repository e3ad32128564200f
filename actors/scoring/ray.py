"""Scoring on Ray: a pool of actors that divide the calibration sequences, and the candidates if need be."""

from dataclasses import replace
from typing import TYPE_CHECKING

from actors.contracts import ActorPoolSpec, Progress, ScoreResult, ScoreSpec, no_progress
from actors.out_of_memory import once_more_with_less
from actors.ray_pool import ActorPool

if TYPE_CHECKING:
    from actors.scoring.score import Scorer, Shard, ShardScores

SHARDS_PER_ACTOR = 4
"""More shards than actors, so that a fast actor takes over from a slow or lost one."""


class ScoreActor:
    """Scores shards of one spec; holds its models between shards."""

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


class MergeActor:
    """Merges layers."""

    def work(self, spec: ScoreSpec) -> ScoreResult:
        """Return the merges that remove as many layers as the spec says."""
        from actors.scoring.laco import merge_result

        return merge_result(spec)


def score_on_ray(spec: ScoreSpec, pool: ActorPoolSpec, progress: Progress = no_progress) -> ScoreResult:
    """Score on a pool of actors; begin as soon as one of them has a place.

    Merges are tried one upon another and so are one task on one actor's place.
    A shard whose actor is lost goes to another; the others are not run again.
    All actors have ended when this returns, so that training can have their place.

    Raises:
        WorkError: no actor got a place in time, or all were lost.
        MemoryExhaustedError: memory does not suffice, with half of the budget neither.
    """
    from actors.scoring.criteria import FixedCriterion, MergeCriterion, criterion_of
    from actors.scoring.fixed import fixed_result
    from actors.scoring.score import Scorer, memory_shares, run_shards

    criterion = criterion_of(spec)
    if isinstance(criterion, FixedCriterion):
        return fixed_result(spec)
    if isinstance(criterion, MergeCriterion):
        with ActorPool(replace(pool, actors=1), MergeActor, setting="scoring", progress=progress) as actors:
            ((_, merged),) = actors.dispatch([spec])
            return merged
    # A shard reads a streamed model's files once, so there are no more than actors.
    count = pool.actors if spec.stream_weights else pool.actors * SHARDS_PER_ACTOR

    def score(memory_share: float) -> ScoreResult:
        with ActorPool(pool, ScoreActor, spec, memory_share, setting="scoring", progress=progress) as actors:
            return run_shards(Scorer(spec), actors.dispatch, count, at_least=pool.actors, progress=progress)

    return once_more_with_less(score, **memory_shares(spec))
