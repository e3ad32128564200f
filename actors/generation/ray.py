"""Generation on Ray: a pool of actors that divide the prompts."""

from dataclasses import replace
from typing import TYPE_CHECKING

from actors.contracts import ActorPoolSpec, GenerationResult, GenerationSpec, Progress, no_progress
from actors.out_of_memory import once_more_with_less
from actors.ray_pool import ActorPool

if TYPE_CHECKING:
    from actors.generation.responses import Engine, Response, Shard


class GenerateActor:
    """Generates responses to shards of one spec's prompts; holds the model between shards."""

    def __init__(self, spec: GenerationSpec):
        self._spec = spec
        self._engine: Engine | None = None

    def work(self, shard: "Shard") -> "list[Response]":
        """Return the responses to the shard's prompts."""
        if self._engine is None:
            from actors.generation.engines import open_engine

            # Not opened when the actor is made: Ray would report its death instead of what is wrong.
            self._engine = open_engine(self._spec)
        return self._engine.respond(shard)


def generate_on_ray(
    spec: GenerationSpec, uri: str, pool: ActorPoolSpec, progress: Progress = no_progress
) -> GenerationResult:
    """Generate on a pool of actors; begin as soon as one of them has a place.

    A shard whose actor is lost goes to another; the others are not run again. The
    responses depend neither on the number of actors nor on which of them generates them.

    Raises:
        WorkError: no actor got a place in time, or all were lost.
        MemoryExhaustedError: memory does not suffice, with half of the batch neither.
    """
    from actors.generation.responses import batch_sizes, run_shards
    from actors.generation.vllm import packages

    if spec.engine == "vllm":
        pool = replace(pool, packages=packages())

    def generate(spec: GenerationSpec) -> GenerationResult:
        with ActorPool(pool, GenerateActor, spec, setting="generation", progress=progress) as actors:
            return run_shards(spec, actors.dispatch, uri, progress, workers=pool.actors)

    return once_more_with_less(generate, **batch_sizes(spec))
