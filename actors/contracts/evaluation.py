"""Requests and results of evaluation."""

from dataclasses import dataclass

from actors.contracts.data import TextSpec
from actors.contracts.models import ModelRef


@dataclass(frozen=True)
class PerplexitySpec:
    """Token perplexity of a text, concatenated and cut into windows of `context` tokens."""

    name: str
    data: TextSpec
    context: int = 1024
    max_tokens: int | None = None


@dataclass(frozen=True)
class ThroughputSpec:
    """Time prefill of `context` tokens and decoding of `new_tokens` after them; medians of `repeats`."""

    context: int = 512
    new_tokens: int = 64
    batch_size: int = 1
    repeats: int = 5


FewShot = int | tuple[tuple[str, int], ...] | None
"""Examples in a prompt: a number for all tasks, or one for each task or group named; else the task's own."""


@dataclass(frozen=True)
class EvaluationSpec:
    """Measure `model` on perplexity texts, lm-eval tasks, probes and its speed.

    `tasks` holds the members of `suites`, too, whose names end in `task_suffix`;
    the suites themselves only give their means. `max_length` is the longest
    input in tokens, the model's own if None. `batch_size` counts the longest
    requests evaluated at a time, None what memory allows; it changes no result.
    With `apply_chat_template`, tasks are put as conversations, their examples as turns.

    `probes` are names in `PROBES`; `limit` holds for them as for tasks, and
    `max_new_tokens` bounds the texts that they have the model write. Code in them is
    run only with `allow_code_execution`. `throughput` is measured beside the
    unpruned model. `tasks_fingerprint` is that of the folder `include_path` when the
    campaign was planned; another folder in its place is refused.
    """

    model: ModelRef
    perplexity: tuple[PerplexitySpec, ...] = ()
    tasks: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    task_suffix: str = ""
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: FewShot = None
    apply_chat_template: bool = False
    max_length: int | None = None
    batch_size: int | None = None
    seed: int = 0
    probes: tuple[str, ...] = ()
    max_new_tokens: int = 128
    allow_code_execution: bool = False
    throughput: ThroughputSpec | None = None
    tasks_fingerprint: str | None = None


@dataclass(frozen=True)
class Metric:
    """One measured number. `name` is `subject/measure`, e.g. `blimp_sample/acc`."""

    name: str
    value: float
    unit: str = ""
    stderr: float | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of one model, with the versions that produced them."""

    metrics: tuple[Metric, ...]
    num_parameters: int
    versions: tuple[tuple[str, str], ...] = ()
