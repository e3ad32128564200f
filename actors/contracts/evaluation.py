"""Requests and results of evaluation."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from actors.contracts import names
from actors.contracts.artifacts import ArtifactRef
from actors.contracts.data import TextSettings, TextSpec
from actors.contracts.models import ModelRef, ModelSpec
from actors.contracts.settings import AddedLater, Doc, InKeyAs, Known, LocalPath, Name, NotInKey, Settings


@dataclass(frozen=True)
class PerplexitySettings(Settings):
    """Token perplexity of a text, concatenated and cut into windows of `context` tokens."""

    name: Annotated[
        Name, Doc("Metrics are NAME/token_perplexity, NAME/loss_nats and NAME/loss_over_log_vocab.")
    ]
    data: TextSettings
    context: Annotated[int, Ge(2), Doc("Tokens a window; windows do not overlap.")] = 1024
    max_tokens: Annotated[int | None, Ge(2), Doc("Only the text's first so many tokens.")] = None


@dataclass(frozen=True)
class PerplexitySpec(PerplexitySettings):
    """The perplexity of a text as the plan found it."""

    data: TextSpec


@dataclass(frozen=True)
class ThroughputSpec(Settings):
    """Speed and memory, measured beside the unpruned model on the same machine."""

    context: Annotated[int, Ge(1), Doc("Tokens before the first generated one.")] = 512
    new_tokens: Annotated[int, Ge(2), Doc("Tokens generated in one run.")] = 64
    batch_size: Annotated[int, Ge(1), Doc("Sequences generated at a time.")] = 1
    repeats: Annotated[int, Ge(1), Doc("Runs of each model, after a warm-up; medians are reported.")] = 5


FewShot = int | tuple[tuple[str, int], ...] | None
"""Examples in a prompt: a number for all tasks, or one for each task or group named; else the task's own."""

NumFewshot = Annotated[int, Ge(0)]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Settings):
    """What is measured, on the dense model and after every iteration."""

    perplexity: tuple[PerplexitySettings, ...] = (
        PerplexitySettings("wikitext2", TextSettings(builtin="wikitext-2-raw-test")),
    )
    suites: Annotated[
        tuple[str, ...], Known(names.SUITES), Doc("Batteries of tasks, by name; see docs/evaluation.md.")
    ] = ()
    tasks: Annotated[
        tuple[str, ...], Known(names.TASKS), Doc("Further lm-eval tasks and groups, by name.")
    ] = ()
    include_path: Annotated[
        str | None, LocalPath(), Doc("Directory with further lm-eval tasks."), NotInKey()
    ] = None
    task_suffix: Annotated[
        str, Doc("Added to the names of suite members, for variants of them in `include_path`.")
    ] = ""
    limit: Annotated[int | None, Ge(1), Doc("Only the first so many documents of a task.")] = None
    num_fewshot: Annotated[
        NumFewshot | dict[str, NumFewshot] | None,
        Doc("Examples in the prompt, for all tasks or as TASK: NUMBER; else the task's own."),
    ] = None
    apply_chat_template: Annotated[
        bool,
        Doc("Put tasks as conversations by the model's chat template; task_metric's, too."),
        AddedLater(False),
    ] = False
    system_instruction: Annotated[
        str | None,
        Doc(
            "Text before every prompt of a task; with `apply_chat_template` the system's turn, before the "
            "task's own description. task_metric's, too."
        ),
        AddedLater(None),
    ] = None
    max_length: Annotated[
        int | None, Ge(2), Doc("Longest input of a task in tokens; the model's own if not given.")
    ] = None
    batch_size: Annotated[
        Annotated[int, Ge(1)] | Literal["auto"],
        Doc("Longest requests at a time; `auto` is what memory allows. Changes no result."),
        NotInKey(),
    ] = "auto"
    probes: Annotated[
        tuple[str, ...],
        Known(names.PROBES),
        Doc("degeneration, arithmetic, code_failures, speculative, or a plug-in's; see docs/probes.md."),
    ] = ()
    max_new_tokens: Annotated[int, Ge(1), Doc("Longest text that a probe has the model write.")] = 128
    num_assistant_tokens: Annotated[
        int, Ge(1), AddedLater(5), Doc("Tokens that the draft of the probe speculative gives at a time.")
    ] = 5
    allow_code_execution: Annotated[
        bool, Doc("Run the code that the model writes, in a sandbox, against its tests.")
    ] = False
    throughput: Annotated[ThroughputSpec | None, Doc("Measure speed and memory, too.")] = None
    log_samples: Annotated[
        bool,
        Doc(
            "Keep every document's prompt, responses and metrics, one samples_TASK.jsonl a task, with the "
            "stage's files. Changes no result."
        ),
        NotInKey(),
    ] = False


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec(EvaluationSettings):
    """Measure `model` on perplexity texts, lm-eval tasks, probes and its speed.

    `tasks` holds the members of `suites`, too, whose names end in `task_suffix`;
    the suites themselves only give their means. `batch_size` None is what memory allows.
    `limit` holds for probes as for tasks. `tasks_fingerprint` is that of the folder
    `include_path` when the campaign was planned; another folder in its place is refused. `assistant` drafts
    for `model` in the probe speculative; without it `model` drafts for the unpruned one.
    """

    model: ModelRef
    perplexity: tuple[PerplexitySpec, ...] = ()
    num_fewshot: FewShot = None  # type: ignore[assignment]
    batch_size: int | None = None  # type: ignore[assignment]
    seed: int = 0
    assistant: Annotated[ModelSpec | None, AddedLater(None)] = None
    tasks_fingerprint: Annotated[str | None, InKeyAs("include_path")] = None


@dataclass(frozen=True)
class Metric:
    """One measured number. `name` is `subject/measure`, e.g. `blimp_sample/acc`."""

    name: str
    value: float
    unit: str = ""
    stderr: float | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of one model, with the versions that produced them.

    `num_fewshot` are the examples in the prompts of each task. `artifact` holds `samples_TASK.jsonl`
    where the spec asks for samples.
    """

    metrics: tuple[Metric, ...]
    num_parameters: int
    versions: tuple[tuple[str, str], ...] = ()
    num_fewshot: tuple[tuple[str, int], ...] = ()
    artifact: ArtifactRef | None = None
