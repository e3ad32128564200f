"""A first campaign file, with comments, from a few answers."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from actors.contracts.settings import NAME
from orchestrator.config import parse_config
from orchestrator.errors import RequestError

SEQUENCE_LENGTH = 512
BATCH_SIZE, MICRO_BATCH_SIZE = 32, 4
"""Sequences of an optimizer step, and at most of a worker at a time."""
CPU_TOKENS = 16_384
"""Of the test text, where there is no GPU: the whole takes hours."""
START_TOKENS = 500_000
"""Of the linear map before training, at most: about a hundred times the hidden size of a 7B model."""
LEARNING_RATE = "2e-4"
"""As QLoRA (arXiv 2305.14314, App. B.2) has it for models of 7B and 13B."""
WARMUP_SHARE = 0.05
"""Share of a recovery's steps in which the learning rate rises to its peak."""
WIKITEXT = "{path: Salesforce/wikitext, config: wikitext-2-raw-v1, split: train}"


@dataclass(frozen=True)
class Answers:
    """What a campaign file cannot do without.

    `gpus` is the number of GPUs to use, 0 for CPUs; `data` a file or, with `builtin`, the name of
    a built-in text; `name` what paths call campaign and model, made from `model` if None.
    """

    model: str
    fractions: tuple[float, ...] = (0.1, 0.25)
    dtype: str = "auto"
    gpus: int = 1
    data: str | None = None
    builtin: bool = False
    max_tokens: int = 2_500_000
    name: str | None = None
    storage: str = "runs"


def campaign_file(answers: Answers, file: str) -> str:
    """Return the text of a commented campaign file; `file` is what its commands call it.

    Raises:
        ConfigError: an answer makes no valid campaign.
        RequestError: the budget does not hold a sequence for each worker.
    """
    environment = Environment(
        loader=PackageLoader("orchestrator.cli"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    model_id = answers.name or short_name(answers.model)
    batch_size, micro_batch_size = batch_for(answers.max_tokens, max(1, answers.gpus))
    steps = answers.max_tokens // (batch_size * SEQUENCE_LENGTH)
    data = WIKITEXT
    if answers.data is not None:
        data = f"{{{'builtin' if answers.builtin else 'path'}: {_quoted(answers.data)}}}"
    text = environment.get_template("campaign.yaml.j2").render(
        file=file,
        name=_quoted(model_id),
        model_id=_quoted(model_id),
        model=_quoted(answers.model),
        dtype=answers.dtype,
        data=data,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=LEARNING_RATE,
        warmup_steps=round(WARMUP_SHARE * steps),
        steps=steps,
        max_tokens=answers.max_tokens,
        start_tokens=min(answers.max_tokens, START_TOKENS),
        test_tokens=None if answers.gpus else CPU_TOKENS,
        fractions=answers.fractions,
        backend="ray",
        workers=max(1, answers.gpus),
        gpus=min(1, answers.gpus),
        storage=_quoted(answers.storage),
    )
    # Plain YAML reads `1e-4` as a word; the project's own reader does not.
    parse_config(yaml.safe_load(re.sub(r"\b(\d+)e-", r"\1.0e-", text)), file)
    return text


def batch_for(max_tokens: int, workers: int) -> tuple[int, int]:
    """Return batch and micro-batch in sequences that `workers` share evenly and a budget in tokens holds.

    Raises:
        RequestError: it does not hold a sequence for each worker.
    """
    share = min(max(BATCH_SIZE, workers), max_tokens // SEQUENCE_LENGTH) // workers
    if not share:
        least = workers * SEQUENCE_LENGTH
        raise RequestError(
            f"--max-tokens {max_tokens} is less than a sequence of {SEQUENCE_LENGTH} tokens for each worker; "
            f"give {least} or more"
        )
    micro = max(size for size in range(1, MICRO_BATCH_SIZE + 1) if share % size == 0)
    return share * workers, micro


def layer_shares(text: str) -> tuple[float, ...]:
    """Read `0.1,0.25` or `10%, 25%`.

    Raises:
        RequestError: one of them is no share of the layers between 0 and 1.
    """
    shares = []
    for part in map(str.strip, text.split(",")):
        try:
            share = float(part.removesuffix("%")) / (100 if part.endswith("%") else 1)
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise RequestError(
                f"{part!r} is no share of the layers to remove: give numbers between 0 and 1 or percentages, "
                "as 0.1,0.25 or 10%,25%"
            )
        shares.append(share)
    return tuple(shares)


def short_name(model: str) -> str:
    """Shorten `meta-llama/Llama-3.2-1B` to `llama-3.2-1b`, fit for results and paths."""
    last = Path(model.rstrip("/")).name.lower().removesuffix(".gguf")
    name = re.sub(r"[^a-z0-9._-]+", "-", last).strip("-._")[:60]
    return name if NAME.fullmatch(name) else "model"


def _quoted(value: str) -> str:
    """Quote a value so that YAML takes it whatever is in it, inside braces, too."""
    return yaml.safe_dump([value], default_flow_style=True, width=10_000).strip()[1:-1]
