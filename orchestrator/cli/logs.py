"""The command `logs`: what driver, workers and stages of a run have said."""

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import Run
from orchestrator.cli.output import err, out, print_table
from orchestrator.cli.runs import existing_run
from orchestrator.errors import RequestError, unknown_name

if TYPE_CHECKING:
    from orchestrator.storage.stage_store import Store

POLL_S = 2.0

FOLLOWED_LINES = 10
"""Of each log that is there when it begins to be followed."""


def logs(
    run: Run,
    trajectory: Annotated[
        str | None, typer.Option(help="Id of a trajectory, as `iterabre status` shows it.")
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Kind of stage (score, recover, …), its key, or driver or workers for theirs."),
    ] = None,
    iteration: Annotated[int | None, typer.Option(help="Of this iteration only.", min=0)] = None,
    lines: Annotated[
        int | None, typer.Option(help="Only the last lines of each; 10 with --follow.", min=1)
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes; Ctrl-C ends it.")] = False,
) -> None:
    """Show the logs of a run's stages; without options, list which there are."""
    from orchestrator.storage.stage_logs import read_log
    from orchestrator.storage.stage_store import Store

    store = Store(existing_run(run))
    if trajectory is stage is iteration is None and not follow:
        _list(store)
        return
    found = _found(store, trajectory, stage, iteration)
    if not found and not follow:
        raise RequestError(_nothing_found(store, trajectory))
    printer = _Printer(lines or (FOLLOWED_LINES if follow else None))
    while True:
        for name, size in found.items():
            if printer.has_news(name, size):
                printer.show(name, read_log(store, name), complete=not follow, among=len(found))
        if not follow:
            return
        printer.lines = None  # of logs that begin later, all
        time.sleep(POLL_S)
        found = _found(store, trajectory, stage, iteration)


class _Printer:
    """Prints what is new in logs; of one that is shown for the first time, the last `lines`."""

    def __init__(self, lines: int | None) -> None:
        self.lines = lines
        self._shown: dict[str, int] = {}
        self._last = ""

    def has_news(self, name: str, size: int | None) -> bool:
        """Return whether a log of that size has more than was shown; one whose size is not known may."""
        return size is None or size != self._shown.get(name)

    def show(self, name: str, content: bytes, complete: bool, among: int) -> None:
        """Print what is new of a log; an unfinished line waits for its end unless that is all."""
        end = len(content) if complete else content.rfind(b"\n") + 1
        new = content[self._shown.get(name, 0) : end].decode(errors="replace").splitlines(keepends=True)
        if name not in self._shown and self.lines:
            new = new[-self.lines :]
        self._shown[name] = end
        if new and among > 1 and name != self._last:
            sys.stdout.write(f"==> {name} <==\n")
        if new:
            self._last = name
            sys.stdout.writelines(new)
            sys.stdout.flush()


def _found(
    store: "Store", trajectory: str | None, stage: str | None, iteration: int | None
) -> dict[str, int | None]:
    """Return the logs that are wanted, by name, with their sizes where these are known."""
    from orchestrator.storage.stage_logs import DRIVER_LOG, WORKERS_LOG, stage_logs

    of_all = {"driver": DRIVER_LOG, "workers": WORKERS_LOG}
    if stage in of_all:
        return {of_all[stage]: None}
    return {
        log.name: log.size_bytes
        for log in stage_logs(store)
        if trajectory in (None, log.trajectory)
        and iteration in (None, log.iteration)
        and (stage in (None, log.stage) or log.key.startswith(str(stage)[:12]))
    }


def _list(store: "Store") -> None:
    from orchestrator.storage.stage_logs import stage_logs

    found = stage_logs(store)
    if not found:
        err.print("No stage has written a log yet; see --stage driver and --stage workers.")
        return
    for trajectory in dict.fromkeys(each.trajectory for each in found):
        own = [each for each in found if each.trajectory == trajectory]
        columns = {
            "iteration": [str(each.iteration) for each in own],
            "stage": [each.stage for each in own],
            "key": [f"{each.key}" for each in own],
            "kB": [f"{each.size_bytes / 1e3:.1f}" for each in own],
        }
        print_table(columns, trajectory)
    out.print(f"Directory  {store.logs_uri}", soft_wrap=True, highlight=False)


def _nothing_found(store: "Store", trajectory: str | None) -> str:
    from orchestrator.storage.run_manifest import existing_run
    from orchestrator.storage.stage_logs import stage_logs

    known = {*(existing_run(store).get("planned") or ()), *(each.trajectory for each in stage_logs(store))}
    if trajectory is not None and trajectory not in known:
        raise unknown_name("trajectory", trajectory, known)
    return (
        "no log of such a stage: stages that were found in the store write none; `iterabre logs RUN` lists "
        "which there are"
    )
