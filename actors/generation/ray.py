"""Generation on Ray: a pool of actors that share the prompts."""

from functools import partial
from typing import TYPE_CHECKING

import ray

from actors.contracts import GenerationResult, GenerationSpec, Progress, no_progress
from actors.ray_pool import placement, pool_of, share_out, wait_for_place

if TYPE_CHECKING:
    from actors.generation.responses import Engine, Response, Share


class GenerateActor:
    """Answers shares of one spec's prompts; holds the model between shares."""

    def __init__(self, spec: GenerationSpec):
        self._spec = spec
        self._engine: Engine | None = None

    def ready(self) -> bool:
        """Answers once the actor has been placed."""
        return True

    def work(self, share: "Share") -> "list[Response]":
        """Responses to the share's prompts."""
        if self._engine is None:
            from actors.generation.engines import open_engine

            # Not opened when the actor is made: Ray would tell of its death instead of what is wrong.
            self._engine = open_engine(self._spec)
        return self._engine.answer(share)


def generate_on_ray(
    spec: GenerationSpec,
    uri: str,
    *,
    actors: int,
    cpus: float,
    gpus: float,
    start_timeout_s: float,
    progress: Progress = no_progress,
) -> GenerationResult:
    """Generate on a pool of up to `actors` actors; begins as soon as one of them has a place.

    A share whose actor is lost goes to another; the others are not run again. The
    responses depend neither on the number of actors nor on which of them answers.

    Raises:
        WorkError: no actor got a place within `start_timeout_s`, or all were lost.
    """
    from actors.generation.responses import conduct

    remote = ray.remote(GenerateActor).options(**placement(cpus, gpus), max_restarts=3)
    with pool_of(actors, partial(remote.remote, spec)) as pool:
        wait_for_place([actor.ready.remote() for actor in pool], "generation", cpus, gpus, start_timeout_s)
        return conduct(spec, partial(share_out, pool, what="generate"), uri, progress)
