"""The command `evaluate`: measure a model."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actors.contracts import names as known
from orchestrator.cli.options import (
    AllowCodeExecution,
    Dtype,
    IncludePath,
    Json,
    Model,
    Probes,
    Revision,
    TaskSuffix,
    TrustRemoteCode,
    absolute,
    completing,
    names_in,
    new_directory,
    source_model,
)
from orchestrator.cli.output import print_json, print_table
from orchestrator.errors import RequestError

if TYPE_CHECKING:
    from actors.contracts import EvaluationResult, FewShot


Tasks = Annotated[
    str,
    typer.Option(
        help="lm-eval tasks and suites, separated by commas.",
        autocompletion=completing(*known.SUITES, *known.TASKS),
    ),
]
Throughput = Annotated[bool, typer.Option("--throughput", help="Measure speed and memory, too.")]
Limit = Annotated[int | None, typer.Option(help="Only the first so many documents.", min=1)]
NumFewshot = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[TASK=]N",
        help="Examples in the prompts of all tasks, or of one task or group. Repeatable; the tasks' own if "
        "not given.",
    ),
]
ApplyChatTemplate = Annotated[
    bool,
    typer.Option("--apply-chat-template", help="Put tasks as conversations by the model's chat template."),
]
SystemInstruction = Annotated[
    str | None, typer.Option(help="Text before every prompt; the system's turn with --apply-chat-template.")
]
Assistant = Annotated[
    str | None,
    typer.Option(
        help="Smaller model that drafts for this one: measure what speculative decoding gains by it.",
        callback=absolute,
    ),
]
NumAssistantTokens = Annotated[int, typer.Option(help="Tokens that the assistant drafts at a time.", min=1)]
LogSamples = Annotated[
    Path | None,
    typer.Option(
        metavar="DIRECTORY",
        help="Write prompts, responses and metrics of every document there, a samples_TASK.jsonl a task.",
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(help="Longest requests at a time; by default what memory allows.", min=1)
]


def evaluate(
    model: Model,
    tasks: Tasks = "",
    probes: Probes = "",
    throughput: Throughput = False,
    allow_code_execution: AllowCodeExecution = False,
    limit: Limit = None,
    num_fewshot: NumFewshot = None,
    apply_chat_template: ApplyChatTemplate = False,
    system_instruction: SystemInstruction = None,
    assistant: Assistant = None,
    num_assistant_tokens: NumAssistantTokens = 5,
    log_samples: LogSamples = None,
    include_path: IncludePath = None,
    task_suffix: TaskSuffix = "",
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure a model on lm-eval tasks and probes."""
    from actors.contracts import EvaluationSpec, ModelRef, ThroughputSpec, to_json
    from actors.evaluation import SUITES, check_probes, check_tasks, evaluate_model, suite_tasks
    from actors.models import describe_model, load_tokenizer
    from orchestrator.planning.checks import check_evaluation

    names, probe_names = names_in(tasks), names_in(probes)
    if assistant is not None:
        probe_names = tuple(dict.fromkeys((*probe_names, "speculative")))
    elif "speculative" in probe_names:
        raise RequestError("the probe speculative needs a model that drafts: give --assistant")
    if not (names or probe_names or throughput):
        raise RequestError("nothing to measure: give --tasks, --probes or --throughput")
    if log_samples is not None and not names:
        raise RequestError("--log-samples keeps samples of tasks: give --tasks")
    suites = tuple(name for name in names if name in SUITES)
    members = suite_tasks(suites, task_suffix)
    single = (name for name in names if name not in SUITES)
    info = describe_model(source_model(model, dtype, revision, trust_remote_code))
    drafting = None
    if assistant is not None:
        drafting = describe_model(source_model(assistant, dtype, None, trust_remote_code)).spec
    spec = EvaluationSpec(
        model=ModelRef(info.spec),
        tasks=tuple(dict.fromkeys((*members, *single))),
        suites=suites,
        task_suffix=task_suffix,
        include_path=include_path,
        limit=limit,
        num_fewshot=parse_num_fewshot(num_fewshot or ()),
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        batch_size=batch_size,
        probes=probe_names,
        num_assistant_tokens=num_assistant_tokens,
        assistant=drafting,
        allow_code_execution=allow_code_execution,
        throughput=ThroughputSpec() if throughput else None,
        log_samples=log_samples is not None,
    )
    check_tasks(spec.tasks, include_path, spec.num_fewshot)
    check_probes(probe_names)
    check_evaluation(spec, info, load_tokenizer(info.spec))
    with nullcontext() if log_samples is None else new_directory(log_samples, "--log-samples"):
        result = evaluate_model(spec, samples_uri=None if log_samples is None else str(log_samples.resolve()))
    if as_json:
        print_json(to_json(result))
    else:
        print_table(metric_columns(result), model)


def parse_num_fewshot(given: Sequence[str]) -> "FewShot":
    """Read `5` as a number for all tasks, and `boolq=0` and `mmlu=5` as one for each.

    Raises:
        RequestError: neither; or a number for all beside others.
    """
    parts = [part for text in given for part in names_in(text)]
    matches = [re.fullmatch(r"(?:([^=]+)=)?(\d+)", part, re.ASCII) for part in parts]
    pairs = [(match[1], int(match[2])) for match in matches if match]
    if len(pairs) < len(parts) or (len(pairs) > 1 and any(name is None for name, _ in pairs)):
        raise RequestError(
            f"--num-fewshot {' '.join(given)}: write it as 5 for all tasks, or as boolq=0,mmlu=5"
        )
    if not pairs:
        return None
    return pairs[0][1] if pairs[0][0] is None else tuple(pairs)


def metric_columns(result: "EvaluationResult") -> dict[str, list[str]]:
    """Return the table of an evaluation, with the columns of lm-eval's own."""
    versions, shots = dict(result.versions), dict(result.num_fewshot)
    rows: list[tuple[str, ...]] = []
    shown = ""
    for metric in result.metrics:
        task, _, measure = metric.name.partition("/")
        first = task != shown
        shown = task
        rows.append(
            (
                task if first else "",
                versions.get(f"task:{task}", "") if first else "",
                str(shots.get(task, "")) if first else "",
                measure,
                f"{metric.value:.4f}",
                "" if metric.stderr is None else f"± {metric.stderr:.4f}",
            )
        )
    names = ("task", "version", "n-shot", "metric", "value", "± stderr")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}
