"""Requests and results of generation."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from actors.contracts.artifacts import ArtifactRef
from actors.contracts.data import TextSpec
from actors.contracts.models import ModelSpec
from actors.contracts.settings import AddedLater, Doc, NotInKey, Settings


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Settings):
    """How the unpruned model answers prompts, for the objective `sgr`."""

    max_prompts: Annotated[int | None, Ge(1), Doc("Only the first so many prompts.")] = None
    responses_per_prompt: Annotated[int, Ge(1), Doc("Sampled responses a prompt.")] = 1
    max_new_tokens: Annotated[int, Ge(1), Doc("Longest response.")] = 512
    temperature: Annotated[float, Ge(0), Doc("0 takes the likeliest token.")] = 0.0
    top_p: Annotated[float, Gt(0), Le(1), Doc("Share of probability that is sampled from.")] = 1.0
    batch_size: Annotated[
        int, Ge(1), Doc("Prompts answered at a time; requests under way at a time with openai."), NotInKey()
    ] = 8
    engine: Annotated[
        Literal["transformers", "vllm", "openai"],
        Doc("What generates; openai is a server with that API, such as `vllm serve`."),
    ] = "transformers"
    max_model_len: Annotated[
        int | None,
        Ge(2),
        AddedLater(None),
        Doc("Longest prompt and response together; the model's context if not given."),
    ] = None
    tensor_parallel_size: Annotated[
        int | None,
        Ge(1),
        Doc("GPUs that vllm spreads the model over; all that it has if not given."),
        NotInKey(),
    ] = None
    base_url: Annotated[
        str | None, Doc("For openai: where the unpruned model is served, http://HOST:PORT/v1."), NotInKey()
    ] = None
    served_model: Annotated[
        str | None, Doc("For openai: the name of the model there; its path if not given."), NotInKey()
    ] = None

    def __post_init__(self) -> None:
        if self.responses_per_prompt > 1 and self.temperature == 0:
            raise ValueError("several responses_per_prompt would all be the same at temperature 0; raise it")
        if self.engine == "openai" and not (self.base_url or "").startswith(("http://", "https://")):
            raise ValueError("the engine openai needs base_url: http://HOST:PORT/v1")
        if self.max_model_len is not None and self.max_model_len <= self.max_new_tokens:
            raise ValueError(
                f"max_model_len {self.max_model_len} leaves no room for a prompt beside "
                f"max_new_tokens {self.max_new_tokens}"
            )


@dataclass(frozen=True, kw_only=True)
class GenerationSpec(GenerationSettings):
    """Have the unpruned `model` answer prompts (self-generated responses, *Limits* §4).

    `prompts` is read for its prompts only. `batch_size` changes no response but by rounding.
    """

    model: ModelSpec
    prompts: TextSpec
    seed: int = 0

    def responses(self, artifact: ArtifactRef) -> TextSpec:
        """Return the responses as a text to train on, written by the template of the prompts."""
        prompts = self.prompts
        return TextSpec(generated=artifact, chat_template=prompts.chat_template, template=prompts.template)


@dataclass(frozen=True)
class GenerationResult:
    """Responses as an artifact of JSONL files: a line a response, in the order of the prompts.

    A line has `prompt` (its messages), `response`, `finished` (it ended by itself)
    and `tokens` (of the response). `num_tokens` counts those of all responses.
    """

    artifact: ArtifactRef
    num_prompts: int
    num_responses: int
    num_tokens: int
    num_finished: int
