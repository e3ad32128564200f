"""The commands that look at a run, `status` and `report`, and what others show of one."""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator.cli.options import Json, Run

if TYPE_CHECKING:
    from orchestrator.storage.stage_store import Store

out = Console()
err = Console(stderr=True)


def status(run: Run, as_json: Json = False) -> None:
    """Show the numbers a run has so far, from its ledger, and what became of its trajectories."""
    from orchestrator.storage.stage_store import Store

    existing_run(run)
    if as_json:
        sys.stdout.write(status_json(run) + "\n")
        return
    show_results(run)
    show_outcomes(Store(run))


def report(run: Run) -> None:
    """Write the HTML report of a run, finished or not."""
    out.print(str(build_report(existing_run(run))), soft_wrap=True)


def existing_run(run: str) -> str:
    from orchestrator.storage import run_manifest
    from orchestrator.storage.stage_store import Store

    run_manifest.existing_run(Store(run), repr(run))
    return run


def status_json(run: str) -> str:
    """A line of numbers for each iteration, and how each trajectory that has ended did so."""
    from orchestrator.reporting.tables.tables import iteration_table
    from orchestrator.storage.ledger import Ledger
    from orchestrator.storage.stage_store import Store
    from orchestrator.storage.trajectory_status import read_statuses

    store = Store(run)
    lines = iteration_table(Ledger(store.ledger_uri).read())
    outcomes = {trajectory: asdict(outcome) for trajectory, outcome in read_statuses(store).items()}
    return json.dumps({"iterations": lines, "outcomes": outcomes}, indent=2, ensure_ascii=False)


def show_results(run: str) -> None:
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


def show_outcomes(store: "Store") -> None:
    """Name the trajectories that failed or were given up, with the reason."""
    from orchestrator.storage.trajectory_status import read_statuses

    for trajectory, outcome in read_statuses(store).items():
        if outcome.state != "done":
            line = f"{outcome.state}: {trajectory}: {outcome.reason}"
            err.print(line, style="red", markup=False, soft_wrap=True)


def build_report(run: str) -> str:
    from actors.artifacts import local_path, publish
    from orchestrator.reporting.html import build_report
    from orchestrator.reporting.run_source import read_source
    from orchestrator.storage.stage_store import Store

    store = Store(run)
    source = read_source(store)
    if directory := local_path(store.report_uri):
        return str(build_report(source, directory))
    with tempfile.TemporaryDirectory() as scratch:
        build_report(source, Path(scratch))
        return publish(Path(scratch), store.report_uri).uri
