"""`iterabre ls`: the names that a campaign file may hold, each with where it comes from."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Json, completing
from orchestrator.cli.output import print_json, print_table
from orchestrator.errors import RequestError, unknown_name

Rows = list[dict[str, str]]

RECIPES = Path(__file__).parents[2] / "configs/recipes"


def criteria() -> Rows:
    """What decides which layers go: `scoring.criterion`."""
    from actors.scoring import CRITERIA

    rows = [
        {
            "criterion": name,
            "removes": "the highest" if c.highest_first else "the lowest",
            "source": c.source,
        }
        for name, c in CRITERIA.items()
    ]
    return rows + _registered("criterion", "criterion")


def objectives() -> Rows:
    """What a recovery trains for: `recovery.objective`."""
    from actors.recovery import OBJECTIVES

    rows = [
        {"objective": name, "trains_on": row.trains_on, "source": row.paper}
        for name, row in OBJECTIVES.items()
    ]
    return rows + _registered("recovery objective", "objective")


def probes() -> Rows:
    """Measurements beside lm-eval's tasks: `evaluation.probes`."""
    from actors.evaluation import PROBES

    rows = [
        {"probe": name, "measures": ", ".join(row.gives), "source": row.paper} for name, row in PROBES.items()
    ]
    return rows + _registered("probe", "probe")


def suites() -> Rows:
    """Tasks that a paper reports together: `evaluation.suites`."""
    from actors.evaluation import SUITES

    return [
        {"suite": name, "tasks": " ".join(row.members), "source": row.paper} for name, row in SUITES.items()
    ]


def tasks() -> Rows:
    """Tasks and groups of the installed lm-eval: `evaluation.tasks`."""
    from actors.evaluation import task_names

    return [{"task": name} for name in task_names()]


def recipes() -> Rows:
    """Campaign files to begin with, in a clone of the repository; `iterabre init` writes one like `best`."""
    if not RECIPES.is_dir():
        raise RequestError(
            f"recipes are files of the repository ({RECIPES} is not there): clone it, or let `iterabre init` "
            "write a campaign file like the recipe `best`"
        )
    # A recipe's first line says what it is for.
    return [
        {
            "recipe": file.stem,
            "for": file.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# "),
            "file": f"configs/recipes/{file.name}",
        }
        for file in sorted(RECIPES.glob("*.yaml"))
    ]


KINDS: dict[str, Callable[[], Rows]] = {
    "criteria": criteria,
    "objectives": objectives,
    "suites": suites,
    "tasks": tasks,
    "probes": probes,
    "recipes": recipes,
}


def ls(
    kind: Annotated[
        str,
        typer.Argument(
            help="criteria, objectives, suites, tasks, probes or recipes.", autocompletion=completing(*KINDS)
        ),
    ],
    search: Annotated[str | None, typer.Option(help="Only lines with this in them.")] = None,
    json: Json = False,
) -> None:
    """List what there is to choose from, and the paper that each comes from."""
    if kind not in KINDS:
        raise unknown_name("list", kind, KINDS)
    rows = [
        row for row in KINDS[kind]() if search is None or search.lower() in " ".join(row.values()).lower()
    ]
    if json:
        print_json(rows)
    elif kind == "tasks":
        typer.echo("\n".join(row["task"] for row in rows))
    elif rows:
        print_table(
            {name.replace("_", " "): [row.get(name, "") for row in rows] for name in rows[0]},
            (KINDS[kind].__doc__ or "").strip(),
        )


def _registered(kind: str, column: str) -> Rows:
    """Return the rows of other installed packages."""
    from actors.plugins import registered

    return [{column: name, "source": "another package"} for name in sorted(registered(kind).names)]
