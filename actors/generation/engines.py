"""The engines of generation: one row each."""

from collections.abc import Callable

from actors.contracts import GenerationResult, GenerationSpec, Progress, no_progress
from actors.errors import unknown_name
from actors.generation.endpoint import EndpointEngine
from actors.generation.responses import Engine, batch_sizes, run_shards
from actors.generation.transformers import TransformersEngine
from actors.generation.vllm import VllmEngine
from actors.out_of_memory import once_more_with_less

ENGINES: dict[str, Callable[[GenerationSpec], Engine]] = {
    "transformers": TransformersEngine,
    "vllm": VllmEngine,
    "openai": EndpointEngine,
}


def open_engine(spec: GenerationSpec) -> Engine:
    """Return the engine that `spec` names, with its model loaded.

    Raises:
        RequestError: there is none of that name, or it is not installed.
    """
    if spec.engine not in ENGINES:
        raise unknown_name("generation engine", spec.engine, ENGINES)
    return ENGINES[spec.engine](spec)


def generate_locally(spec: GenerationSpec, uri: str, progress: Progress = no_progress) -> GenerationResult:
    """Generate responses to all prompts in this process and publish the responses at `uri`.

    Raises:
        RequestError: no prompts, no chat template, or no such engine.
    """

    def generate(spec: GenerationSpec) -> GenerationResult:
        engine = open_engine(spec)
        return run_shards(
            spec, lambda shards: ((shard, engine.respond(shard)) for shard in shards), uri, progress
        )

    return once_more_with_less(generate, **batch_sizes(spec))
