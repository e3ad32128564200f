"""The command `evaluate`: measure a model."""

from typing import Annotated

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
    completing,
    names_in,
    source_model,
)
from orchestrator.cli.output import print_json, print_table
from orchestrator.errors import RequestError


def evaluate(
    model: Model,
    tasks: Annotated[
        str,
        typer.Option(
            help="lm-eval tasks and suites, separated by commas.",
            autocompletion=completing(*known.SUITES, *known.TASKS),
        ),
    ] = "",
    probes: Probes = "",
    throughput: Annotated[bool, typer.Option("--throughput", help="Measure speed and memory, too.")] = False,
    allow_code_execution: AllowCodeExecution = False,
    limit: Annotated[int | None, typer.Option(help="Only the first so many documents.", min=1)] = None,
    include_path: IncludePath = None,
    task_suffix: TaskSuffix = "",
    batch_size: Annotated[
        int | None, typer.Option(help="Longest requests at a time; by default what memory allows.", min=1)
    ] = None,
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
    if not (names or probe_names or throughput):
        raise RequestError("nothing to measure: give --tasks, --probes or --throughput")
    suites = tuple(name for name in names if name in SUITES)
    members = suite_tasks(suites, task_suffix)
    single = (name for name in names if name not in SUITES)
    info = describe_model(source_model(model, dtype, revision, trust_remote_code))
    spec = EvaluationSpec(
        model=ModelRef(info.spec),
        tasks=tuple(dict.fromkeys((*members, *single))),
        suites=suites,
        task_suffix=task_suffix,
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        probes=probe_names,
        allow_code_execution=allow_code_execution,
        throughput=ThroughputSpec() if throughput else None,
    )
    check_tasks(spec.tasks, include_path)
    check_probes(probe_names)
    check_evaluation(spec, info, load_tokenizer(info.spec))
    result = evaluate_model(spec)
    if as_json:
        print_json(to_json(result))
        return
    columns = {
        "metric": [metric.name for metric in result.metrics],
        "value": [f"{metric.value:.4f}" for metric in result.metrics],
        "stderr": ["" if metric.stderr is None else f"{metric.stderr:.4f}" for metric in result.metrics],
    }
    print_table(columns, model)
