"""Prompts in shards, and the responses to them as an artifact."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from actors.artifacts import publish
from actors.contracts import GenerationResult, GenerationSpec, Progress
from actors.data import RowTally, read_prompts
from actors.errors import RequestError

log = logging.getLogger(__name__)

Prompt = tuple[dict[str, str], ...]

PROMPTS_PER_SHARD = {"transformers": 64, "vllm": 8192, "openai": 256}
"""Of each engine, at most: vLLM makes its batches out of all prompts of a call."""
FILE = "responses.jsonl"


@dataclass(frozen=True)
class Response:
    """The model's response to a prompt; `finished` if it ended by itself within the limit.

    Or none: `left_out` says why the prompt cannot be answered, `too_long` that it leaves no room.
    """

    prompt: Prompt
    response: str = ""
    finished: bool = False
    tokens: int = 0
    left_out: str | None = None
    too_long: bool = False

    def line(self) -> str:
        """Return the response as a line of JSON."""
        named = {name: getattr(self, name) for name in ("prompt", "response", "finished", "tokens")}
        return json.dumps(named, ensure_ascii=False) + "\n"


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
        """Return the responses to the shard's prompts, in order, several for each if the spec says so.

        Prompts that cannot be answered follow at the end.
        """


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


def run_shards(
    spec: GenerationSpec, compute: Compute, uri: str, progress: Progress, workers: int = 1
) -> GenerationResult:
    """Divide the prompts into shards, compute them, and publish the responses in the order of the prompts.

    Args:
        workers: how many compute at a time: each is to get a shard.

    Raises:
        RequestError: no prompts, all are too long for the model, or too many cannot be written.
    """
    prompts = read_prompts(spec.prompts, spec.max_prompts)
    size = min(PROMPTS_PER_SHARD[spec.engine], -(-len(prompts) // workers))
    shards = [Shard(at, tuple(prompts[at : at + size])) for at in range(0, len(prompts), size)]
    tally, too_long = RowTally(spec.prompts), 0
    done = num_responses = tokens = finished = 0
    with TemporaryDirectory(prefix="iterabre-responses-") as scratch, TemporaryDirectory() as parts:
        for shard, computed in compute(shards):
            done += len(shard.prompts)
            tally.at(done - 1, None)
            for response in computed:
                if response.left_out and not response.too_long:
                    tally.skip(RequestError(response.left_out))
            too_long += sum(response.too_long for response in computed)
            responses = [response for response in computed if response.left_out is None]
            lines = (response.line() for response in responses)
            (Path(parts) / f"{shard.first}").write_text("".join(lines), encoding="utf-8")
            num_responses += len(responses)
            tokens += sum(response.tokens for response in responses)
            finished += sum(response.finished for response in responses)
            progress(done, len(prompts), f"{tokens} tokens")
        tally.finish()
        if too_long:
            log.warning("%d of %d prompts left out: too long for the context", too_long, len(prompts))
        if not num_responses:
            raise RequestError(
                f"all {len(prompts)} prompts are too long for the context of {spec.model.path!r}"
            )
        with (Path(scratch) / FILE).open("wb") as whole:
            for shard in shards:
                whole.write((Path(parts) / f"{shard.first}").read_bytes())
        artifact = publish(Path(scratch), uri)
    return GenerationResult(artifact, len(prompts), num_responses, tokens, finished)
