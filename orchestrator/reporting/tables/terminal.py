"""The tables that `iterabre` prints: narrow headings, sensible digits, no wider than the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.table import Table

from orchestrator.reporting.data.accuracies import KEPT, MEAN_ACCURACY, kept, with_mean_accuracy
from orchestrator.reporting.data.comparisons import NOT_PRUNED, targets
from orchestrator.reporting.data.measured import (
    DENSE,
    PRUNED,
    RECOVERED,
    Measured,
    headline_metrics,
    measured_models,
)
from orchestrator.reporting.tables.metric_names import BEFORE_RECOVERY, named
from orchestrator.reporting.tables.tables import Line, before, is_perplexity, show

FIRST = ("model", "method", "seed", "layers")
HEADINGS = {
    "dropped": "drop",
    "dropped score": "score",
    "parameters": "params",
    KEPT: "kept\n%",
}
MAX_CELL = 20
GAP = 2
"""Characters: the widest cell before it is broken into lines, and the space between two columns."""


def comparison_lines(ledger: pa.Table) -> list[Line]:
    """Return a line for each unpruned model and for each trajectory at each of its targets.

    A trajectory that has no target yet has its smallest measured model; one that is alone has all of them.
    `dropped` (source layer indices), `dropped score` and `seconds` are of the iterations since the
    trajectory's line before. Metrics come as `headline_metrics` has them, then perplexities before recovery.
    """
    models = with_mean_accuracy(measured_models(ledger))
    trajectories = list(dict.fromkeys(model.trajectory for model in models))
    reached = targets(ledger)
    pruned = {(m.trajectory, m.iteration): m for m in models if m.phase == PRUNED}
    dense = {m.model: m for m in reversed(models) if m.phase == DENSE}
    shown: list[tuple[Measured, int]] = [(model, -1) for model in dense.values()]
    for trajectory in trajectories:
        own = [m for m in models if (m.trajectory, m.phase) == (trajectory, RECOVERED)]
        at_targets = [m for m in own if (trajectory, m.iteration) in reached]
        last = 0
        for model in own if len(trajectories) == 1 else at_targets or own[-1:]:
            shown.append((model, last))
            last = model.iteration
    sources = list(dense) or list(dict.fromkeys(model.model for model in models))
    shown.sort(key=lambda one: (sources.index(one[0].model), -(one[0].layers or 0)))
    metrics = headline_metrics([model for model, _ in shown])
    lines = [
        _line(model, dense.get(model.model), pruned.get((model.trajectory, model.iteration)), metrics)
        | _since(ledger, model, last)
        for model, last in shown
    ]
    several = {name: len({line[name] for line in lines} - {None, NOT_PRUNED}) > 1 for name in FIRST}
    return [
        {name: value for name, value in line.items() if several.get(name, True) or name == "layers"}
        for line in lines
    ]


def _line(model: Measured, dense: Measured | None, pruned: Measured | None, metrics: Sequence[str]) -> Line:
    line: Line = {
        "model": model.model,
        "method": NOT_PRUNED if model.phase == DENSE else model.method,
        "seed": None if model.phase == DENSE else model.seed,
        "layers": model.layers,
    }
    for name in metrics:
        number = model.numbers.get(name)
        line[name] = number and number.value
        if name == MEAN_ACCURACY:
            whole = dense and dense.numbers.get(name)
            share = kept(number, whole) if number and whole else None
            line[KEPT] = share and share.value
    line["parameters"] = model.parameters
    for name in filter(is_perplexity, metrics):
        number = pruned.numbers.get(name) if pruned else None
        line[before(name)] = number and number.value
    return line


def _since(ledger: pa.Table, model: Measured, last: int) -> Line:
    """Return what the trajectory dropped, and the seconds it took, since iteration `last`."""
    iteration = pc.field("iteration")
    rows = ledger.filter(
        (pc.field("trajectory") == model.trajectory)
        & (iteration > last)
        & (iteration <= model.iteration)
        & pc.field("metric").isin(["dropped", "seconds"])
    ).to_pylist()
    dropped = sorted((row["layer"], row["value"]) for row in rows if row["metric"] == "dropped")
    return {
        "dropped": tuple(layer for layer, _ in dropped),
        "dropped score": tuple(score for _, score in dropped),
        "seconds": sum(row["value"] for row in rows if row["metric"] == "seconds"),
    }


def comparison_table(lines: Sequence[Line], width: int) -> Table:
    """Lay out `comparison_lines` in at most `width` characters.

    What matters most comes first; columns that do not fit are named below the table, nothing is cut off.
    """
    columns = {
        name: [_cell(name, line[name]) for line in lines]
        for name in lines[0]
        if any(line[name] not in (None, ()) for line in lines)
    }
    free = width
    shown: dict[str, list[str]] = {}
    left_out: list[str] = []
    for name, cells in columns.items():
        needed = _width(name, cells)
        if needed <= free or name in FIRST:
            shown[_heading(name)] = cells
            free -= needed
        else:
            left_out.append(named(name))
    caption = f"not shown: {', '.join(left_out)}; the report and status --json have all" if left_out else None
    return plain_table(shown, "", caption)


def plain_table(columns: Mapping[str, Sequence[str]], title: str, caption: str | None = None) -> Table:
    """Lay out columns of text under their headings, numbers to the right."""
    table = Table(
        title=title or None,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, GAP - 1, 0, 0),
        show_edge=False,
        header_style="bold",
    )
    for heading, cells in columns.items():
        if any(cell[:1].isalpha() for cell in cells):
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", max_width=MAX_CELL)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _width(name: str, cells: Sequence[str]) -> int:
    longest = max(map(len, (*cells, *_heading(name).splitlines())))
    return (longest if name in FIRST else min(longest, MAX_CELL)) + GAP


def _heading(name: str) -> str:
    """Break a column's heading into several short lines."""
    if name in HEADINGS:
        return HEADINGS[name]
    words = named(name).replace("perplexity", "ppl").replace(BEFORE_RECOVERY, " pruned")
    return words.replace("-Challenge", "-C").replace("-Easy", "-E").replace(" ", "\n")


def _cell(name: str, value: Any) -> str:
    if name == "parameters" and value:
        return f"{value / 1e6:.1f}M" if value >= 1e5 else show(value)
    if name == "dropped score" and value and len(value) > 2:
        return f"{show(min(value))} to {show(max(value))}"
    if name in (KEPT, "seconds") and value is not None:
        return f"{value:,.0f}"
    return show(value)
