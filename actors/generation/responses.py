"""Prompts shared out to be answered, and the responses as an artifact."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from actors.artifacts import publish
from actors.contracts import GenerationResult, GenerationSpec, Progress
from actors.data import read_prompts
from actors.errors import RequestError

Prompt = tuple[dict[str, str], ...]

PROMPTS_A_SHARE = 64
FILE = "responses.jsonl"


@dataclass(frozen=True)
class Response:
    """What the model said to a prompt; `finished` if it ended by itself within the limit."""

    prompt: Prompt
    response: str
    finished: bool
    tokens: int


@dataclass(frozen=True)
class Share:
    """Prompts that follow one another; the first is number `first` of all."""

    first: int
    prompts: tuple[Prompt, ...]


ShareOut = Callable[[Sequence[Share]], Iterator[tuple[Share, list[Response]]]]
"""Has every share answered, in any order."""


class Engine(Protocol):
    """A loaded model that answers."""

    def answer(self, share: Share) -> list[Response]:
        """Responses to the share's prompts, in order, several for each if the spec says so."""


def conduct(spec: GenerationSpec, share_out: ShareOut, uri: str, progress: Progress) -> GenerationResult:
    """Cut the prompts into shares, have them answered, and publish the responses in the order of the prompts.

    Raises:
        RequestError: no prompts, or all are too long for the model.
    """
    prompts = read_prompts(spec.prompts, spec.max_prompts)
    shares = [
        Share(at, tuple(prompts[at : at + PROMPTS_A_SHARE])) for at in range(0, len(prompts), PROMPTS_A_SHARE)
    ]
    done = responses = tokens = finished = 0
    with TemporaryDirectory(prefix="iterabre-responses-") as scratch, TemporaryDirectory() as parts:
        for share, answers in share_out(shares):
            _write(Path(parts) / f"{share.first}", answers)
            done += len(share.prompts)
            responses += len(answers)
            tokens += sum(answer.tokens for answer in answers)
            finished += sum(answer.finished for answer in answers)
            progress(done, len(prompts), f"{tokens} tokens")
        if not responses:
            raise RequestError(
                f"all {len(prompts)} prompts are too long for the context of {spec.model.path!r}"
            )
        _join((Path(parts) / f"{share.first}" for share in shares), Path(scratch) / FILE)
        artifact = publish(Path(scratch), uri)
    return GenerationResult(artifact, len(prompts), responses, tokens, finished)


def _write(file: Path, answers: Iterable[Response]) -> None:
    lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
    file.write_text("".join(lines), encoding="utf-8")


def _join(parts: Iterable[Path], file: Path) -> None:
    with file.open("wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
