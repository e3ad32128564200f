"""The command `logs`: what driver, workers and stages of a run have said."""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import Run
from orchestrator.cli.output import err, out, print_table
from orchestrator.cli.runs import existing_run
from orchestrator.errors import RequestError, unknown_name

if TYPE_CHECKING:
    from orchestrator.storage.stage_logs import StageLog
    from orchestrator.storage.stage_store import Store

POLL_S = 2.0


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
    lines: Annotated[int | None, typer.Option(help="Only so many lines at the end of each.", min=1)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes; Ctrl-C ends it.")] = False,
) -> None:
    """Show the logs of a run's stages; without options, list which there are."""
    from orchestrator.storage.stage_logs import read_log
    from orchestrator.storage.stage_store import Store

    store = Store(existing_run(run))
    if trajectory is stage is iteration is None and not follow:
        _list(store)
        return
    shown: dict[str, int] = {}
    names = _names(store, trajectory, stage, iteration)
    if not names and not follow:
        raise RequestError(_nothing_found(store, trajectory))
    last = None
    while True:
        for name in names:
            content = read_log(store, name)
            new = content[shown.get(name, 0) :]
            if not follow or new.endswith(b"\n") or not new:
                end = len(content)
            else:  # an unfinished line waits for its end
                end = len(content) - len(new) + new.rfind(b"\n") + 1
                new = new[: new.rfind(b"\n") + 1]
            if new or name not in shown:
                if len(names) > 1 and name != last:
                    sys.stdout.write(f"==> {name} <==\n")
                last = name
                sys.stdout.writelines(_tail(new, lines if name not in shown else None))
                sys.stdout.flush()
            shown[name] = end
        if not follow:
            return
        time.sleep(POLL_S)
        names = _names(store, trajectory, stage, iteration)


def _names(store: "Store", trajectory: str | None, stage: str | None, iteration: int | None) -> list[str]:
    """Return the names of the logs that are wanted."""
    from orchestrator.storage.stage_logs import DRIVER_LOG, WORKERS_LOG, stage_logs

    of_all = {"driver": DRIVER_LOG, "workers": WORKERS_LOG}
    if stage in of_all:
        return [of_all[stage]]

    def wanted(found: "StageLog") -> bool:
        return (
            trajectory in (None, found.trajectory)
            and iteration in (None, found.iteration)
            and (stage in (None, found.stage) or found.key.startswith(str(stage)[:12]))
        )

    return [found.name for found in stage_logs(store) if wanted(found)]


def _tail(content: bytes, lines: int | None) -> Iterator[str]:
    found = content.decode(errors="replace").splitlines(keepends=True)
    yield from found[-lines:] if lines else found


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
