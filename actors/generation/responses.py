"""Prompts in shards, and the responses to them as an artifact."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from actors.artifacts import publish
from actors.contracts import GenerationResult, GenerationSpec, Progress
from actors.data import read_prompts
from actors.errors import RequestError

Prompt = tuple[dict[str, str], ...]

PROMPTS_PER_SHARD = 64
FILE = "responses.jsonl"


@dataclass(frozen=True)
class Response:
    """The model's response to a prompt; `finished` if it ended by itself within the limit."""

    prompt: Prompt
    response: str
    finished: bool
    tokens: int


@dataclass(frozen=True)
class Shard:
    """Prompts that follow one another; the first is number `first` of all."""

    first: int
    prompts: tuple[Prompt, ...]


Compute = Callable[[Sequence[Shard]], Iterator[tuple[Shard, list[Response]]]]
"""Computes shards somewhere and yields each with its responses, in any order."""


class Engine(Protocol):
    """A loaded model that generates responses."""

    def respond(self, shard: Shard) -> list[Response]:
        """Return the responses to the shard's prompts, in order, several for each if the spec says so."""


def batch_sizes(spec: GenerationSpec) -> dict[str, Any]:
    """Return how a generation that lacks memory is tried again; see `once_more_with_less`."""
    half = spec.batch_size // 2
    return {
        "size": spec,
        "smaller": replace(spec, batch_size=half) if half else None,
        "what": f"generation by {spec.model.path!r}",
        "setting": "recovery.generation.batch_size",
        "remedy": "lower recovery.generation.max_new_tokens, or use a device with more memory",
    }


def run_shards(spec: GenerationSpec, compute: Compute, uri: str, progress: Progress) -> GenerationResult:
    """Divide the prompts into shards, compute them, and publish the responses in the order of the prompts.

    Raises:
        RequestError: no prompts, or all are too long for the model.
    """
    prompts = read_prompts(spec.prompts, spec.max_prompts)
    shards = [
        Shard(at, tuple(prompts[at : at + PROMPTS_PER_SHARD]))
        for at in range(0, len(prompts), PROMPTS_PER_SHARD)
    ]
    done = num_responses = tokens = finished = 0
    with TemporaryDirectory(prefix="iterabre-responses-") as scratch, TemporaryDirectory() as parts:
        for shard, responses in compute(shards):
            lines = (json.dumps(asdict(response), ensure_ascii=False) + "\n" for response in responses)
            (Path(parts) / f"{shard.first}").write_text("".join(lines), encoding="utf-8")
            done += len(shard.prompts)
            num_responses += len(responses)
            tokens += sum(response.tokens for response in responses)
            finished += sum(response.finished for response in responses)
            progress(done, len(prompts), f"{tokens} tokens")
        if not num_responses:
            raise RequestError(
                f"all {len(prompts)} prompts are too long for the context of {spec.model.path!r}"
            )
        with (Path(scratch) / FILE).open("wb") as whole:
            for shard in shards:
                whole.write((Path(parts) / f"{shard.first}").read_bytes())
        artifact = publish(Path(scratch), uri)
    return GenerationResult(artifact, len(prompts), num_responses, tokens, finished)
