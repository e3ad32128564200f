"""Teaching on Ray: a pool of actors that divide the sequences of the training data."""

from typing import TYPE_CHECKING

from actors.contracts import ActorPoolSpec, FileRef, Progress, TeachResult, TeachSpec, no_progress
from actors.out_of_memory import once_more_with_less
from actors.ray_pool import ActorPool

if TYPE_CHECKING:
    from actors.teaching.shards import Shard
    from actors.teaching.teacher import Teacher


class TeachActor:
    """Stores the teacher's states of shards at `uri`; holds the model between shards."""

    def __init__(self, spec: TeachSpec, uri: str):
        self._spec, self._uri = spec, uri
        self._teacher: Teacher | None = None

    def work(self, shard: "Shard") -> FileRef:
        """Compute and publish the states of the shard's sequences."""
        if self._teacher is None:
            from actors.teaching.teacher import Teacher

            # Not loaded when the actor is made: Ray would report its death instead of what is wrong.
            self._teacher = Teacher(self._spec)
        return self._teacher.publish(shard, self._uri)


def teach_on_ray(
    spec: TeachSpec, uri: str, pool: ActorPoolSpec, progress: Progress = no_progress
) -> TeachResult:
    """Run the teacher on a pool of actors; begin as soon as one of them has a place.

    A shard whose actor is lost goes to another; the others are not run again. States go from the actors to
    `uri` and nowhere else.

    Raises:
        WorkError: no actor got a place in time, or all were lost.
        MemoryExhaustedError: memory does not suffice, with half of the batch neither.
    """
    from actors.models import load_tokenizer
    from actors.recovery import training_data
    from actors.teaching.shards import batch_sizes, run_shards

    lengths_S = training_data(spec.reading(), load_tokenizer(spec.model)).lengths_S

    def run(spec: TeachSpec) -> TeachResult:
        with ActorPool(pool, TeachActor, spec, uri, setting="teaching", progress=progress) as actors:
            return run_shards(spec, lengths_S, actors.dispatch, uri, progress)

    return once_more_with_less(run, **batch_sizes(spec))
