"""The commands `compress` and `campaign`: run a campaign file."""

from typing import Annotated

import typer

from orchestrator.cli.error_boundary import error_boundary
from orchestrator.cli.options import Address, Config, Set
from orchestrator.cli.output import err, out, say
from orchestrator.cli.runs import build_report, show_results, show_statuses
from orchestrator.config import CampaignConfig, load_config
from orchestrator.errors import RequestError, WorkError

Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run that is there; start one if there is none.")
]
AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="Let --resume go on though the run is of something else, such as another model under an id.",
    ),
]

Verify = Annotated[
    bool,
    typer.Option("--verify", help="Read and hash all that is finished, not only compare sizes and ETags."),
]


def compress(
    config: Config,
    resume: Resume = False,
    accept_changes: AcceptChanges = False,
    verify: Verify = False,
    address: Address = None,
    set_: Set = None,
) -> None:
    """Compress one model with one method: a campaign file with one of each."""
    loaded = load_config(config, set_)
    if len(loaded.models) != 1 or len(loaded.methods) != 1:
        raise RequestError(
            f"{config} has {len(loaded.models)} models and {len(loaded.methods)} methods; "
            "`compress` takes one of each, `iterabre campaign` takes many"
        )
    _run(loaded, resume, accept_changes, verify, address)


def campaign(
    config: Config,
    resume: Resume = False,
    accept_changes: AcceptChanges = False,
    verify: Verify = False,
    address: Address = None,
    set_: Set = None,
) -> None:
    """Run a campaign file: models × methods × seeds, with stops at the targets."""
    _run(load_config(config, set_), resume, accept_changes, verify, address)


def _run(
    config: CampaignConfig, resume: bool, accept_changes: bool, verify: bool, address: str | None
) -> None:
    say(f"{config.name}: loading the libraries")  # seconds; the rest says what it does as it comes to it
    from orchestrator.execution.campaign import run_campaign
    from orchestrator.execution.cluster import find_cluster
    from orchestrator.planning.planner import build_plan
    from orchestrator.storage.control import read_control
    from orchestrator.storage.run_manifest import read_run
    from orchestrator.storage.stage_store import Store
    from orchestrator.tracking.publisher import attach_files
    from orchestrator.tracking.trackers import make_trackers

    store = Store.of_config(config.storage, config.name, verify)
    say("Checking the request: models, texts, tasks and the storage")
    if config.execution.backend == "ray":
        find_cluster(address)
    with error_boundary(lambda: store.logs_dir if read_run(store) is not None else None):
        try:
            plan = build_plan(config)
            for note in plan.notes:
                err.print(f"Note: {note}", style="dim", markup=False, highlight=False, soft_wrap=True)
            if read_control(store).paused:
                err.print(f"Note: the run is paused; `iterabre continue {store.uri}` goes on", soft_wrap=True)
            outcome = run_campaign(
                config,
                plan,
                store,
                resume=resume,
                address=address,
                accept_changes=accept_changes,
                tell=say,
            )
        except KeyboardInterrupt as stopped:
            raise WorkError("stopped; finished stages are kept, --resume continues") from stopped
    show_results(store.uri)
    report_file = build_report(store.uri)
    attach_files(make_trackers(config, store), store, say)
    out.print(
        f"\nModels   {store.uri}/models\nReport   {report_file}\nLedger   {store.ledger_uri}", soft_wrap=True
    )
    show_statuses(store)
    if outcome.limit:
        raise WorkError(f"ended early: {outcome.limit}; finished stages are kept, --resume continues")
    if outcome.failures:
        err.print(f"Logs     {store.logs_uri}; iterabre logs {store.uri}", style="dim", soft_wrap=True)
        raise typer.Exit(1)
