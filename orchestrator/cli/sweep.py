"""The command `sweep`: what a model loses with each of its layers."""

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
    completing,
    names_in,
    parse_layers,
    source_model,
)
from orchestrator.cli.output import err, out, print_json, print_table
from orchestrator.errors import RequestError

if TYPE_CHECKING:
    from actors.contracts import EvaluationSpec

Layers = Annotated[
    str | None, typer.Option(help="Layers to remove, one at a time, e.g. 0-9,29; all if not given.")
]
Limit = Annotated[
    int | None, typer.Option(help="Only the first so many prompts, problems, documents.", min=1)
]
BatchSize = Annotated[str, typer.Option(help="Longest requests at a time; auto is what memory allows.")]
Actors = Annotated[
    int, typer.Option(help="Ray actors that share the models; 0 works in this process.", min=0)
]


def sweep(
    model: Model,
    probes: Probes = "degeneration,arithmetic",
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    suites: Annotated[
        str,
        typer.Option(help="Suites of tasks, separated by commas.", autocompletion=completing(*known.SUITES)),
    ] = "",
    task_suffix: TaskSuffix = "",
    include_path: IncludePath = None,
    layers: Layers = None,
    limit: Limit = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest text that a probe asks for.", min=1)] = 128,
    allow_code_execution: AllowCodeExecution = False,
    batch_size: BatchSize = "auto",
    dtype: Dtype = "float32",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[Path, typer.Option(help="Directory for the table and the plots.")] = Path("sweep"),
    actors: Actors = 0,
    cpus: Annotated[float, typer.Option(help="CPUs an actor.")] = 1.0,
    gpus: Annotated[float, typer.Option(help="GPUs an actor; may be a fraction.", min=0)] = 0.0,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join: auto, or HOST:PORT.")] = None,
    as_json: Json = False,
) -> None:
    """Remove every layer once and measure what is lost: a table and a plot."""
    from actors.contracts import ActorPoolSpec, EvaluationSpec, ModelRef, to_json
    from actors.evaluation import suite_tasks
    from orchestrator.execution.single_layer_sweep import run_sweep, sweep_columns, write_sweep

    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
        raise RequestError(f"--batch-size {batch_size!r}: give a number of at least 1, or auto")
    named = names_in(suites)
    spec = EvaluationSpec(
        model=ModelRef(source_model(model, dtype, revision, trust_remote_code)),
        tasks=tuple(dict.fromkeys((*suite_tasks(named, task_suffix), *names_in(tasks)))),
        suites=named,
        task_suffix=task_suffix,
        include_path=include_path,
        limit=limit,
        batch_size=None if batch_size == "auto" else int(batch_size),
        probes=names_in(probes),
        max_new_tokens=max_new_tokens,
        allow_code_execution=allow_code_execution,
    )
    chosen = _checked_layers(spec, layers)
    evaluate_all = None
    if actors:
        from orchestrator.execution.cluster import evaluate_on_cluster

        evaluate_all = evaluate_on_cluster(address, ActorPoolSpec(actors, cpus, gpus))

    def show_progress(done: int, total: int, note: str = "") -> None:
        err.print(f"{done} of {total} {note}", style="dim", highlight=False)

    measured = run_sweep(spec, chosen, evaluate_all, show_progress)
    files = write_sweep(measured, output)
    if as_json:
        print_json(to_json(measured))
        return
    print_table(sweep_columns(measured), f"{model}, one layer removed")
    out.print("\n".join(map(str, files)), soft_wrap=True)


def _checked_layers(spec: "EvaluationSpec", layers: str | None) -> list[int]:
    """Return the layers to remove, all if None; refuse a `spec` that asks for what is not there."""
    from actors.evaluation import check_probes, check_task_data, check_tasks
    from actors.models import describe_model, load_tokenizer
    from actors.models.pruning.surgery import remaining
    from orchestrator.planning.checks import check_evaluation

    if not spec.probes + spec.tasks:
        raise RequestError("nothing to measure: give --probes, --tasks or --suites")
    check_probes(spec.probes)
    check_tasks(spec.tasks, spec.include_path)
    info = describe_model(spec.model.source)
    check_evaluation(spec, info, load_tokenizer(info.spec))
    num_layers = info.num_layers
    chosen = list(range(num_layers)) if layers is None else parse_layers(layers, "--layers")
    for layer in chosen:
        remaining(num_layers, (layer,))
    check_task_data(spec.tasks, spec.include_path, spec.num_fewshot)
    return chosen
