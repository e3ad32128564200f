"""The commands `cancel`, `pause`, `continue` and `prioritise`: what a run is to do while it goes.

They write a file in the run's storage, which its driver reads every few seconds.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import Run
from orchestrator.cli.output import out
from orchestrator.cli.runs import existing_run
from orchestrator.errors import RequestError, unknown_name

if TYPE_CHECKING:
    from orchestrator.storage.control import Control
    from orchestrator.storage.stage_store import Store

Trajectories = Annotated[
    list[str] | None,
    typer.Option("--trajectory", help="Id of a trajectory, as `iterabre status` shows it. Repeatable."),
]


def cancel(run: Run, trajectory: Trajectories = None) -> None:
    """End trajectories of a run, with the stages that they are at; the others go on."""
    if not trajectory:
        raise RequestError(
            "name what to cancel: --trajectory ID, repeatable; `iterabre status` shows the ids. To end a "
            "whole run, stop its driver (Ctrl-C, `ray job stop`)"
        )
    store = _store(run)
    _check_known("trajectory", trajectory, _trajectories(store))
    _change(store, lambda control: control.cancelling(trajectory))
    _say(f"cancelled: {', '.join(trajectory)}; what is finished of it stays")


def pause(run: Run) -> None:
    """Start no further stage of a run; those that run go on to their end."""
    _change(_store(run), lambda control: replace(control, paused=True))
    _say("paused: what runs goes on to its end, nothing starts; `iterabre continue` goes on")


def continue_(run: Run, trajectory: Trajectories = None) -> None:
    """Go on with a run that was paused, or with trajectories that were cancelled."""
    store = _store(run)
    if not trajectory:
        _change(store, lambda control: replace(control, paused=False))
        _say("not paused")
        return
    _check_known("trajectory", trajectory, _trajectories(store))
    _change(store, lambda control: control.continuing(trajectory))
    _say(f"no longer cancelled: {', '.join(trajectory)}; the campaign's command with --resume takes it up")


def prioritise(
    run: Run,
    priority: Annotated[int, typer.Argument(help="Higher goes first; 0 is usual.", show_default=False)],
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Name of a method. Repeatable.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option("--model", help="Id of a model. Repeatable.")] = None,
) -> None:
    """Let stages of methods or models go before others, or after them, when they wait for room."""
    if not method and not model:
        raise RequestError("name what has that priority: --method NAME or --model ID, repeatable")
    store = _store(run)
    known = _trajectories(store).values()
    _check_known("method", method or (), {name for name, _ in known})
    _check_known("model", model or (), {name for _, name in known})
    _change(store, lambda control: control.prioritising(method or (), model or (), priority))
    _say(f"priority {priority}: {', '.join([*(method or ()), *(model or ())])}")


def _store(run: str) -> "Store":
    from orchestrator.storage.stage_store import Store

    return Store(existing_run(run))


def _trajectories(store: "Store") -> dict[str, tuple[str, str]]:
    """Return method and model of each trajectory of the run."""
    from orchestrator.storage.run_manifest import existing_run

    stored = existing_run(store)
    found = {each["trajectory"]: (each["method"], each["model"]) for each in stored.get("trajectories") or ()}
    return {**dict.fromkeys(stored.get("planned") or (), ("", "")), **found}


def _check_known(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)


def _change(store: "Store", change: "Callable[[Control], Control]") -> None:
    from orchestrator.storage.control import read_control, write_control

    write_control(store, change(read_control(store)))


def _say(what: str) -> None:
    out.print(what, markup=False, highlight=False, soft_wrap=True)
