"""The tables that `iterabre` prints: narrow headings, sensible digits, no wider than the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from orchestrator.reporting.tables.tables import (
    BEFORE_RECOVERY,
    LEADING,
    Line,
    is_perplexity,
    metric_columns,
    show,
)

TIMED = ("score", "recover", "evaluate")
SECONDS = "seconds"
HEADINGS = {
    "iteration": "iter",
    "dropped": "drop",
    "dropped score": "score",
    "parameters": "params",
    SECONDS: "seconds:\n" + "+\n".join(TIMED),
}
MAX_CELL = 20
GAP = 2
"""Characters: the widest cell before it is broken into lines, and the space between two columns."""


def results_table(lines: Sequence[Line], width: int) -> Table:
    """Lay out one trajectory of `iteration_table` in at most `width` characters.

    Metrics that do not fit are named below the table; nothing of it is cut off.
    """
    leading = [name for name in LEADING if name not in ("trajectory", "phase")]
    metrics = [name for name in metric_columns(lines) if _is_shown(name, lines[0])]
    cells = {name: [_cell(name, line[name]) for line in lines] for name in (*leading, *metrics)}
    cells[SECONDS] = ["+".join(f"{line.get(f'{stage} s') or 0:.0f}" for stage in TIMED) for line in lines]
    shown, left_out = _fitting(cells, leading, metrics, width)
    caption = f"not shown: {', '.join(left_out)}; --json and the report have all" if left_out else None
    columns = {_heading(name): cells[name] for name in shown}
    return plain_table(columns, lines[0]["trajectory"], caption)


def plain_table(columns: Mapping[str, Sequence[str]], title: str, caption: str | None = None) -> Table:
    """Lay out columns of text under their headings, numbers to the right."""
    table = Table(
        title=title,
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


def _fitting(
    cells: Mapping[str, Sequence[str]], leading: list[str], metrics: list[str], width: int
) -> tuple[list[str], list[str]]:
    """Return the columns that fit into `width`, and the metrics that do not."""
    free = width - sum(_width(name, cells[name]) for name in (*leading, SECONDS))
    shown: list[str] = []
    for name in metrics:
        width = _width(name, cells[name])
        if width <= free:
            shown.append(name)
            free -= width
    return [*leading, *shown, SECONDS], [name for name in metrics if name not in shown]


def _width(name: str, cells: Sequence[str]) -> int:
    return min(max(map(len, (*cells, *_heading(name).splitlines()))), MAX_CELL) + GAP


def _heading(name: str) -> str:
    """Break a column's heading into several short lines."""
    metric = name.replace("token_perplexity", "ppl").replace(BEFORE_RECOVERY, "/pruned")
    return HEADINGS.get(name) or metric.replace("/", "\n").replace(",", "\n").replace("_", "\n")


def _cell(name: str, value: Any) -> str:
    if name == "parameters" and value:
        return f"{value / 1e6:.1f}M" if value >= 1e5 else show(value)
    if name == "dropped score" and value and len(value) > 2:
        return f"{show(min(value))} to {show(max(value))}"
    return show(value)


def _is_shown(name: str, line: Line) -> bool:
    """Return true unless the metric is the logarithm of a perplexity, or a score before recovery."""
    subject, _, measure = name.partition("/")
    if measure.startswith("loss") and f"{subject}/token_perplexity" in line:
        return False
    return is_perplexity(name) or not name.endswith(BEFORE_RECOVERY)
