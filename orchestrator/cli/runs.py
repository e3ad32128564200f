"""The commands `status` and `report`, and what other commands show of a run."""

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import Json, Run
from orchestrator.cli.output import err, out, print_json

if TYPE_CHECKING:
    from orchestrator.reporting.data.run_status import RunStatus
    from orchestrator.storage.stage_store import Store

WATCH_INTERVAL_S = 10.0
LOCAL_WATCH_INTERVAL_S = 2.0
"""As often as a driver writes how far it is."""


def status(
    run: Run,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until the run has ended.")] = False,
) -> None:
    """Show where every trajectory of a run is, what waits and what failed, and the numbers so far."""
    from orchestrator.reporting.tables.status import status_text
    from orchestrator.reporting.tables.tables import iteration_table
    from orchestrator.storage.ledger import Ledger
    from orchestrator.storage.stage_store import Store
    from orchestrator.storage.trajectory_status import read_statuses

    store = Store(existing_run(run))
    if as_json:
        table = iteration_table(Ledger(store.ledger_uri).read())
        lines = [{name.replace(" ", "_"): value for name, value in line.items()} for line in table]
        statuses = {trajectory: asdict(ended) for trajectory, ended in read_statuses(store).items()}
        shown = asdict(_run_status(store))
        print_json({"iterations": lines, "outcomes": statuses, "run": shown})
        return
    if watch:
        _watch(store)
    else:
        out.print(status_text(_run_status(store), time.time(), with_reasons=False), soft_wrap=True)
    show_results(run)
    show_statuses(store)
    show_usage(store)


def _run_status(store: "Store") -> "RunStatus":
    from orchestrator.reporting.data.run_status import run_status
    from orchestrator.storage.control import read_control
    from orchestrator.storage.run_manifest import existing_run
    from orchestrator.storage.run_progress import read_progress
    from orchestrator.storage.trajectory_status import read_statuses

    planned = existing_run(store).get("planned") or {}
    statuses, saved, control = read_statuses(store), read_progress(store), read_control(store)
    return run_status(planned, statuses, saved, control, time.time())


def _watch(store: "Store") -> None:
    """Show the state of a run until it has ended: in place in a terminal, else whenever it changes."""
    from rich.live import Live

    from actors.artifacts import local_path
    from orchestrator.reporting.tables.status import status_text

    interval_s = WATCH_INTERVAL_S if local_path(store.uri) is None else LOCAL_WATCH_INTERVAL_S
    before = None
    with Live(console=out, auto_refresh=False, vertical_overflow="ellipsis") as live:
        while True:
            now = _run_status(store)
            if out.is_terminal:
                live.update(status_text(now, time.time()), refresh=True)
            elif now.trajectories != before:
                out.print(status_text(now, time.time()), soft_wrap=True)
            if now.state == "ended":
                return
            before = now.trajectories
            time.sleep(interval_s)


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


def show_usage(store: "Store") -> None:
    """Print what the run has cost so far, if it ran on a cluster."""
    from orchestrator.planning.cost_model import machine_of
    from orchestrator.reporting.tables.status import usage_text
    from orchestrator.storage.run_manifest import recorded_config
    from orchestrator.storage.usage import Usage, total_usage

    usage = total_usage(store)
    if usage != Usage():
        cost = recorded_config(store).cost
        text = usage_text(usage, machine_of(cost, cost.machine).price_per_hour)
        out.print(text, markup=False, highlight=False, soft_wrap=True)


def show_statuses(store: "Store") -> None:
    """Name the trajectories that failed, were cancelled or given up, with the reason."""
    from actors.artifacts import join
    from orchestrator.storage.trajectory_status import read_statuses

    for trajectory, ended in read_statuses(store).items():
        if ended.state != "done":
            line = f"{ended.state}: {trajectory}: {ended.reason}"
            err.print(line, style="red", markup=False, soft_wrap=True)
            if ended.log:
                err.print(f"  its log: {join(store.logs_uri, ended.log)}", style="dim", soft_wrap=True)


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
