"""The commands `status` and `report`, and what other commands show of a run."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli.options import Json, Run
from orchestrator.cli.output import err, out, print_json

if TYPE_CHECKING:
    from orchestrator.storage.stage_store import Store


def status(run: Run, as_json: Json = False) -> None:
    """Show the numbers a run has so far, from its ledger, and what became of its trajectories."""
    from orchestrator.reporting.tables.tables import iteration_table
    from orchestrator.storage.ledger import Ledger
    from orchestrator.storage.stage_store import Store
    from orchestrator.storage.trajectory_status import read_statuses

    store = Store(existing_run(run))
    if as_json:
        lines = iteration_table(Ledger(store.ledger_uri).read())
        statuses = {trajectory: asdict(ended) for trajectory, ended in read_statuses(store).items()}
        print_json({"iterations": lines, "outcomes": statuses})
        return
    show_results(run)
    show_statuses(store)


def report(run: Run) -> None:
    """Write the HTML report of a run, finished or not."""
    out.print(str(build_report(existing_run(run))), soft_wrap=True)


def existing_run(run: str) -> str:
    """Return the place of a run.

    Raises:
        RequestError: no run lies there.
    """
    from orchestrator.storage import run_manifest
    from orchestrator.storage.stage_store import Store

    run_manifest.existing_run(Store(run), repr(run))
    return run


def show_results(run: str) -> None:
    """Print a table of numbers for each trajectory."""
    from orchestrator.reporting.tables.tables import iteration_table
    from orchestrator.reporting.tables.terminal import results_table
    from orchestrator.storage.ledger import Ledger
    from orchestrator.storage.stage_store import Store

    lines = iteration_table(Ledger(Store(run).ledger_uri).read())
    for trajectory in dict.fromkeys(line["trajectory"] for line in lines):
        own = [line for line in lines if line["trajectory"] == trajectory]
        out.print(results_table(own, out.width))
    if not lines:
        err.print("No stage is finished yet.")


def show_statuses(store: "Store") -> None:
    """Name the trajectories that failed or were given up, with the reason."""
    from orchestrator.storage.trajectory_status import read_statuses

    for trajectory, ended in read_statuses(store).items():
        if ended.state != "done":
            line = f"{ended.state}: {trajectory}: {ended.reason}"
            err.print(line, style="red", markup=False, soft_wrap=True)


def build_report(run: str) -> str:
    """Write the HTML report beside the run and return its place."""
    from actors.artifacts import local_path, publish
    from orchestrator.reporting.html import build_report
    from orchestrator.reporting.run_source import read_source
    from orchestrator.storage.run_manifest import recorded_store

    store = recorded_store(run)
    source = read_source(store)
    if directory := local_path(store.report_uri):
        return str(build_report(source, directory))
    with tempfile.TemporaryDirectory() as scratch:
        build_report(source, Path(scratch))
        return publish(Path(scratch), store.report_uri).uri
