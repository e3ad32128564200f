"""The `iterabre` command. Heavy modules are imported by the command that needs them."""

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from orchestrator.cli import plan as cli_plan
from orchestrator.cli import runs as cli_runs
from orchestrator.cli import setup as cli_setup
from orchestrator.cli import sweep as cli_sweep
from orchestrator.cli.examples import epilog
from orchestrator.cli.fence import FencedGroup, close_output, fenced
from orchestrator.cli.options import (
    AllowCodeExecution,
    Dtype,
    IncludePath,
    Json,
    Model,
    Probes,
    Revision,
    Run,
    TaskSuffix,
    TrustRemoteCode,
    parse_layers,
    source_model,
)
from orchestrator.config import CampaignConfig, load_config
from orchestrator.errors import IterabreError, RequestError, WorkError

app = typer.Typer(
    help="Make language models smaller: remove whole layers, heal each removal, repeat. On Ray.",
    epilog="Errors are one message; with --debug anywhere on the line, the traceback too.",
    no_args_is_help=True,
    cls=FencedGroup,
    pretty_exceptions_enable=False,
    add_completion=True,
)
out = Console()
err = Console(stderr=True)

Config = Annotated[Path, typer.Argument(help="Campaign file, e.g. configs/demo.yaml.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: methods.0.recovery.max_tokens=4096. Repeatable."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run that is there; start one if there is none.")
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to join: auto, or HOST:PORT. This machine alone if not given.")
]
Granularity = Annotated[
    str, typer.Option(help="What is removed: block, or attention or mlp of single blocks, left as zeros.")
]
Output = Annotated[Path, typer.Option("--output", help="Directory to write; must not exist or be empty.")]


app.command(epilog=epilog("plan"))(cli_plan.plan)


@app.command(epilog=epilog("compress"))
def compress(config: Config, resume: Resume = False, address: Address = None, set_: Set = None) -> None:
    """Compress one model with one method: a campaign file with one of each."""
    loaded = load_config(config, set_)
    if len(loaded.models) != 1 or len(loaded.methods) != 1:
        raise RequestError(
            f"{config} has {len(loaded.models)} models and {len(loaded.methods)} methods; "
            "`compress` takes one of each, `iterabre campaign` takes many"
        )
    _run(loaded, resume, address)


@app.command(epilog=epilog("campaign"))
def campaign(config: Config, resume: Resume = False, address: Address = None, set_: Set = None) -> None:
    """Run a campaign file: models × methods × seeds, with stops at the targets."""
    _run(load_config(config, set_), resume, address)


def _run(config: CampaignConfig, resume: bool, address: str | None) -> None:
    from orchestrator.execution.campaign import run_campaign
    from orchestrator.execution.cluster import find_cluster
    from orchestrator.planning.planner import build_plan
    from orchestrator.storage.run_manifest import read_run
    from orchestrator.storage.stage_store import Store

    store = Store.of_campaign(config.storage.path, config.name)
    err.print(f"Checking the request: {config.name}", style="dim")
    if config.execution.backend == "ray":
        find_cluster(address)
    with fenced(lambda: store.logs_dir if read_run(store) is not None else None):
        try:
            plan = build_plan(config)
            for note in plan.notes:
                err.print(f"Note: {note}", style="dim", markup=False, highlight=False, soft_wrap=True)
            outcome = run_campaign(config, plan, store, resume=resume, address=address)
        except KeyboardInterrupt as stopped:
            raise WorkError("stopped; finished stages are kept, --resume continues") from stopped
    cli_runs.show_results(store.uri)
    report_file = cli_runs.build_report(store.uri)
    out.print(
        f"\nModels   {store.uri}/models\nReport   {report_file}\nLedger   {store.ledger_uri}", soft_wrap=True
    )
    cli_runs.show_outcomes(store)
    if outcome.limit:
        raise WorkError(f"ended early: {outcome.limit}; finished stages are kept, --resume continues")
    if outcome.failures:
        err.print(f"Logs     {store.logs_dir}", style="dim", soft_wrap=True)
        raise typer.Exit(1)


app.command(epilog=epilog("status"))(cli_runs.status)
app.command(epilog=epilog("report"))(cli_runs.report)


@app.command(epilog=epilog("score"))
def score(
    model: Model,
    criterion: Annotated[str, typer.Option(help="How layers are judged.")] = "hidden_cosine",
    calibration: Annotated[
        str, typer.Option(help="Text file, or the name of a built-in text.")
    ] = "iterabre-appendix-a",
    granularity: Granularity = "block",
    dtype: Dtype = "float32",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Score every layer of a model as a candidate for removal."""
    from actors.contracts import ModelRef, ScoreSpec, TextSpec
    from actors.data import BUILTIN_TEXTS, describe_text
    from actors.models import describe_model, load_tokenizer
    from actors.scoring import find_criterion, score_locally
    from orchestrator.planning.checks import check_calibration

    find_criterion(criterion, granularity=granularity)
    text = TextSpec(builtin=calibration) if calibration in BUILTIN_TEXTS else TextSpec(path=calibration)
    text = describe_text(text).spec
    info = describe_model(source_model(model, dtype, revision, trust_remote_code))
    spec = ScoreSpec(
        model=ModelRef(info.spec), calibration=text, criterion=criterion, granularity=cast(Any, granularity)
    )
    check_calibration(spec, info, load_tokenizer(info.spec))
    result = score_locally(spec)
    order = {layer: rank for rank, layer in enumerate(result.removal_order, start=1)}
    rows = [
        {"layer": layer, "score": value, "remove": order[layer]}
        for layer, value in zip(result.source_layers, result.scores, strict=True)
    ]
    if as_json:
        _print_json({"criterion": criterion, "granularity": granularity, "layers": rows})
    else:
        columns = {
            "layer": [str(row["layer"]) for row in rows],
            "score": [f"{row['score']:.6f}" for row in rows],
            "remove": [str(row["remove"]) for row in rows],
        }
        what = criterion if granularity == "block" else f"{criterion} of {granularity}"
        _print_table(columns, f"{what}, {result.num_sequences} sequences; remove 1 first")


@app.command(epilog=epilog("prune"))
def prune(
    model: Model,
    drop: Annotated[str, typer.Option(help="Layers to drop, from 0, e.g. 3,4 or 20-24.")],
    output: Output,
    granularity: Granularity = "block",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; as stored if not given.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a model without some of its layers, with no recovery; models larger than memory too.

    With attention or mlp as granularity, that part of the layers is filled with zeros: it then adds
    nothing, and is as large as before.
    """
    from actors.models import prune_checkpoint

    layers = parse_layers(drop)
    source_model(model, dtype or "float32", revision, trust_remote_code)
    with _new_directory(output):
        num_layers, num_parameters = prune_checkpoint(
            model,
            layers,
            output,
            dtype=cast(Any, dtype),
            granularity=granularity,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    _print_model(output, num_layers, num_parameters)


@app.command(epilog=epilog("evaluate"))
def evaluate(
    model: Model,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks and suites, separated by commas.")] = "",
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

    names, probe_names = cli_sweep.names_in(tasks), cli_sweep.names_in(probes)
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
        _print_json(to_json(result))
        return
    columns = {
        "metric": [metric.name for metric in result.metrics],
        "value": [f"{metric.value:.4f}" for metric in result.metrics],
        "stderr": ["" if metric.stderr is None else f"{metric.stderr:.4f}" for metric in result.metrics],
    }
    _print_table(columns, model)


@app.command(epilog=epilog("export"))
def export(
    run: Run,
    trajectory: Annotated[str, typer.Option(help="Id of a trajectory, as `iterabre status` shows it.")],
    iteration: Annotated[int, typer.Option(help="Iteration whose recovered model is wanted.", min=1)],
    output: Output,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload it, too: to USER/NAME on the hub, private.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see what is uploaded.")] = False,
) -> None:
    """Write the model of any finished iteration of a run, and upload it if asked to."""
    from orchestrator.execution.resolvers import finished_model
    from orchestrator.export.exporter import export_iteration
    from orchestrator.export.hub import check_upload, upload
    from orchestrator.planning.recorded import recorded_trajectory
    from orchestrator.storage.stage_store import Store

    store = Store(cli_runs.existing_run(run))
    if push_to_hub:
        check_upload(push_to_hub)
    with _new_directory(output):
        plan = recorded_trajectory(store, trajectory)
        model = finished_model(plan, store, iteration)
        result = export_iteration(store, plan, iteration, model, output)
    _print_model(output, result.num_layers, result.num_parameters)
    if push_to_hub:
        out.print(upload(output, push_to_hub, public=public), soft_wrap=True)


for command in (cli_sweep.sweep, cli_setup.init, cli_setup.doctor, cli_setup.schema):
    app.command(epilog=epilog(command.__name__))(command)


@contextmanager
def _new_directory(path: Path) -> Iterator[None]:
    """Make a directory for output; if nothing was written into it, it goes again."""
    from actors.artifacts import without_empty_directories

    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RequestError(f"--output {str(path)!r} is there already and not empty; choose another directory")
    with without_empty_directories(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"--output {str(path)!r} cannot be made: {error.strerror}") from error
        yield


def _print_table(columns: dict[str, list[str]], title: str) -> None:
    from orchestrator.reporting.tables.terminal import plain_table

    out.print(plain_table(columns, title))


def _print_model(directory: Path, num_layers: int, num_parameters: int) -> None:
    out.print(f"{directory}: {num_layers} layers, {num_parameters:,} parameters", soft_wrap=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _quiet_libraries() -> None:
    """Keep libraries, which are not imported yet, from showing progress bars and what is no news."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    # It tells of kernels that it could download for this processor.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # What peft should not call in transformers concerns their authors.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed warns on standard output that this machine has no GPU; a cluster's nodes may have."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


def main() -> None:
    """Entry point: errors become one message and an exit code; `--debug` shows the traceback."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    _quiet_libraries()
    try:
        app(args=arguments, prog_name="iterabre")
    except IterabreError as error:
        if debug:
            traceback.print_exc()
        err.print(f"iterabre: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    finally:
        close_output()
