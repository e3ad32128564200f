"""Requests and results of generation."""

from dataclasses import dataclass

from actors.contracts.artifacts import ArtifactRef
from actors.contracts.data import TextSpec
from actors.contracts.models import ModelSpec


@dataclass(frozen=True)
class GenerationSpec:
    """Have the unpruned `model` answer prompts (self-generated responses, *Limits* §4).

    `prompts` is read for its prompts only. `temperature` 0 is greedy decoding.
    `engine` is `transformers` or `vllm`. `batch_size` changes no response but by rounding.
    """

    model: ModelSpec
    prompts: TextSpec
    max_prompts: int | None = None
    responses_per_prompt: int = 1
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 8
    seed: int = 0
    engine: str = "transformers"

    def responses(self, artifact: ArtifactRef) -> TextSpec:
        """The responses as a text to train on, written by the template of the prompts."""
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
