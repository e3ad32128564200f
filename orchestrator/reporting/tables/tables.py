"""One line per iteration, from the ledger: for the terminal, the report, Markdown and LaTeX."""

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from csv import writer as csv_writer
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.reporting.data.measured import NOT_A_SCORE, PRUNED, RECOVERED, Number
from orchestrator.reporting.tables.metric_names import BEFORE_RECOVERY, heading

Line = dict[str, Any]
Cell = tuple[int, str]
"""Row and column."""

STAGES = ("score", "prune", "generate", "teach", "recover", "evaluate", "export")
LEADING = ("trajectory", "iteration", "phase", "layers", "dropped", "dropped score", "parameters")
NOT_MEASURED = "–"
LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    NOT_MEASURED: "--",
    "±": r"$\pm$",
    "×": r"$\times$",
    "→": r"$\rightarrow$",
    "≈": r"$\approx$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}


def is_perplexity(metric: str) -> bool:
    """Return true if lower is better and the number is worth showing before recovery as well."""
    return metric.removesuffix(BEFORE_RECOVERY).endswith("perplexity")


def before(metric: str) -> str:
    """Return the column of a metric measured after pruning and before recovery."""
    return metric + BEFORE_RECOVERY


def iteration_table(ledger: pa.Table) -> list[Line]:
    """Return `iteration_numbers` as plain values."""
    return [
        {name: value.value if isinstance(value, Number) else value for name, value in line.items()}
        for line in iteration_numbers(ledger)
    ]


def iteration_numbers(ledger: pa.Table) -> list[Line]:
    """Return one dict per trajectory and iteration, all with the same keys in the same order.

    Keys: `trajectory`, `iteration` (0 is the unpruned model), `phase` (the last one measured:
    dense, pruned or recovered), `layers` left, `dropped` (source layer indices), `dropped score`
    (theirs), `parameters`, then each metric of what the iteration leaves and, as `... before recovery`,
    of what it recovers, then the seconds of each stage as `score s`, `recover s`, .... What was measured
    is a `Number`, what was not is None: a number of the pruned model never stands for that of the
    recovered one, whose column is there and empty while recovery runs.
    """
    totals = ledger.filter(pc.is_null(ledger["step"]))
    lines: dict[tuple[str, int], Line] = {}
    for row in totals.to_pylist():
        place = (row["trajectory"], row["iteration"])
        line = lines.setdefault(place, {"trajectory": row["trajectory"], "iteration": row["iteration"]})
        _enter(line, row)
    for (trajectory, iteration), line in lines.items():
        first = lines.get((trajectory, 1))
        if iteration == 0 and first and "layers" in first:
            # The depth of the unpruned model: what the first iteration dropped plus what it left.
            line["layers"] = first["layers"] + len(first.get("dropped", ()))
    columns = _columns(lines.values())
    order = {name: rank for rank, name in enumerate(pc.unique(ledger["trajectory"]).to_pylist())}
    return [
        {name: lines[place].get(name) for name in columns}
        for place in sorted(lines, key=lambda place: (order[place[0]], place[1]))
    ]


def metric_columns(lines: Sequence[Line]) -> list[str]:
    """Return the columns of `iteration_table` that come from evaluation."""
    times = {f"{stage} s" for stage in STAGES}
    return [name for name in (lines[0] if lines else ()) if name not in LEADING and name not in times]


def markdown(lines: Sequence[Line], best: Collection[Cell] = (), even: Collection[Cell] = ()) -> str:
    """Write the table in GitHub's Markdown; `best` cells are bold, `even` ones marked ≈."""

    def row(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    if not lines:
        return ""
    body = [
        row(marked(show(value), (i, name), best, even, "**{}**") for name, value in line.items())
        for i, line in enumerate(lines)
    ]
    return "\n".join([row(map(heading, lines[0])), f"|{'---|' * len(lines[0])}", *body]) + "\n"


def marked(
    text: str, cell: Cell, best: Collection[Cell], even: Collection[Cell], bold: str, alike: str = "≈ "
) -> str:
    """Return a cell's text as the best of its group, or as not to be told from it."""
    return bold.format(text) if cell in best else alike + text if cell in even else text


def csv(lines: Sequence[Line]) -> str:
    """Write the table as CSV: raw names, numbers in full, standard errors in columns of their own."""
    columns: dict[str, list[Any]] = {}
    for name in lines[0] if lines else ():
        values = [line[name] for line in lines]
        columns[name] = [
            " ".join(map(str, value)) if isinstance(value, tuple) else getattr(value, "value", value)
            for value in values
        ]
        errors = [getattr(value, "stderr", None) for value in values]
        if any(error is not None for error in errors):
            columns[f"{name} stderr"] = errors
    text = io.StringIO()
    writer = csv_writer(text, lineterminator="\n")
    if columns:
        writer.writerows([list(columns), *zip(*columns.values(), strict=True)])
    return text.getvalue()


def latex(lines: Sequence[Line], best: Collection[Cell] = (), even: Collection[Cell] = ()) -> str:
    """Write the table as LaTeX `tabular` with booktabs rules, marked as by `markdown`."""
    if not lines:
        return ""
    body = []
    for row, line in enumerate(lines):
        cells = {name: _latex_text(show(value)) for name, value in line.items()}
        texts = (
            marked(text, (row, name), best, even, r"\textbf{{{}}}", r"$\approx$ ")
            for name, text in cells.items()
        )
        body.append(" & ".join(texts) + r" \\")
    head = " & ".join(_latex_text(heading(name)) for name in lines[0]) + r" \\"
    columns = "l" + "r" * (len(lines[0]) - 1)
    start, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([start, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end]) + "\n"


def show(value: Any) -> str:
    """Write a cell as text: four significant digits, thousands set apart, a dash for what is missing.

    A measured number has its standard error behind it, where it has one.
    """
    if value is None or value == ():
        return NOT_MEASURED
    if isinstance(value, tuple):
        return ", ".join(map(show, value))
    if isinstance(value, Number):
        return show(value.value) + ("" if value.stderr is None else f" ± {show_error(value.stderr)}")
    if isinstance(value, float):
        return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def show_error(value: float) -> str:
    """Write an error as text: two significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"


def _enter(line: Line, row: Mapping[str, Any]) -> None:
    """Put one row of the ledger into its column."""
    stage, metric, value = row["stage"], row["metric"], row["value"]
    number = Number(value, row["stderr"], row["key"])
    if stage == "evaluate" and line.get("phase") != RECOVERED:
        line["phase"] = row["phase"]
    if metric == "seconds":
        before_it = line.get(f"{stage} s")
        line[f"{stage} s"] = number if before_it is None else Number(before_it.value + value, None, "")
    elif stage == "prune" and metric == "dropped":
        line["dropped"] = (*line.get("dropped", ()), row["layer"])
        line["dropped score"] = (*line.get("dropped score", ()), value)
    elif stage == "prune" and metric == "layers":
        line["layers"] = int(value)
    elif stage == "evaluate" and metric == "parameters":
        line["parameters"] = int(value)
    elif metric in NOT_A_SCORE:
        return
    elif stage == "evaluate" and row["phase"] == PRUNED:
        line[before(metric)] = number
    elif stage == "evaluate":
        line[metric] = number


def _columns(lines: Any) -> list[str]:
    present = {name for line in lines for name in line}
    times = [f"{stage} s" for stage in STAGES]
    metrics = present.difference(LEADING, times)
    metrics |= {name.removesuffix(BEFORE_RECOVERY) for name in metrics}
    # Perplexities first, each preceded by its value before recovery.
    ordered = sorted(
        metrics,
        key=lambda m: (
            not is_perplexity(m),
            m.removesuffix(BEFORE_RECOVERY),
            not m.endswith(BEFORE_RECOVERY),
        ),
    )
    return [*LEADING, *ordered, *(name for name in times if name in present)]


def _latex_text(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text)
