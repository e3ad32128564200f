"""The commands `status` and `report`, and what other commands show of a run."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import Json, Run
from orchestrator.cli.output import err, out, print_json
from orchestrator.errors import RequestError

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


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Where a run lies; several are compared with one another.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Directory to write: RUN/report of one run, ./comparison of several.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write the HTML report of a run, finished or not, or of several runs side by side."""
    runs = list(dict.fromkeys(existing_run(run).rstrip("/") for run in runs))
    if len(runs) == 1 and output is None:
        out.print(build_report(runs[0]), soft_wrap=True)
        return
    output = output or Path("comparison")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--output {str(output)!r} cannot be made: {error.strerror}") from error
    out.print(str(_build_at(runs, output, linked=False)), soft_wrap=True)


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
    """Print one table of the numbers of all trajectories at their targets."""
    from orchestrator.reporting.tables.terminal import comparison_lines, comparison_table
    from orchestrator.storage.ledger import Ledger
    from orchestrator.storage.stage_store import Store

    lines = comparison_lines(Ledger(Store(run).ledger_uri).read())
    if lines:
        out.print(comparison_table(lines, out.width))
    else:
        err.print("Nothing is measured yet.")


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
    from orchestrator.storage.run_manifest import recorded_store

    uri = recorded_store(run).report_uri
    if directory := local_path(uri):
        return str(_build_at([run], directory))
    with tempfile.TemporaryDirectory() as scratch:
        _build_at([run], Path(scratch))
        return publish(Path(scratch), uri).uri


def _build_at(runs: Sequence[str], directory: Path, linked: bool = True) -> Path:
    """Write the HTML report of one run or several to a directory and return its page.

    It is `linked` to the stages of the one run that it lies in.
    """
    from orchestrator.reporting.html import build_report
    from orchestrator.reporting.joined_runs import join_sources
    from orchestrator.reporting.run_source import read_source
    from orchestrator.storage.run_manifest import recorded_store

    sources = [read_source(recorded_store(run)) for run in runs]
    joined = join_sources(dict(zip(short_names(runs), sources, strict=True))) if len(runs) > 1 else sources[0]
    return build_report(joined if linked else replace(joined, stages=None), directory)


def short_names(runs: Sequence[str]) -> list[str]:
    """Return the last parts of the runs' paths, as many as tell them apart."""
    parts = [run.rstrip("/").split("/") for run in runs]
    count = 1
    while len({tuple(part[-count:]) for part in parts}) < len(parts):
        count += 1
    return ["/".join(part[-count:]) for part in parts]
