"""The report: one HTML file that needs no network, with PNG figures and tables beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from actors.artifacts import write_bytes
from orchestrator.report.charts import Chart, HeatMap, comparison_charts, trajectory_charts
from orchestrator.report.figures import interactive, write_png
from orchestrator.report.tables import (
    Line,
    before,
    is_perplexity,
    iteration_table,
    latex,
    markdown,
    metric_columns,
    show,
)


def build_report(
    ledger_table: pa.Table,
    config: Mapping[str, Any],
    out_dir: Path,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write `index.html`, `iterations.md`, `iterations.tex` and `figures/*.png`; return the page.

    An unfinished or empty run gives a report of what there is so far.
    """
    lines = iteration_table(ledger_table)
    figures = out_dir / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    trajectories = list(dict.fromkeys(line["trajectory"] for line in lines))
    page = _environment().get_template("report.html.j2").render(
        name=config.get("name", "campaign"),
        comparison=_draw(comparison_charts(lines), figures, "all") if len(trajectories) > 1 else [],
        sections=[_section(name, ledger_table, lines, figures) for name in trajectories],
        config=yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
        versions=versions or {},
        updated=pc.max(ledger_table["when"]).as_py(),
        plotly_js=Markup(get_plotlyjs()),
    )  # fmt: skip
    write_bytes(str(out_dir / "iterations.md"), markdown(lines).encode())
    write_bytes(str(out_dir / "iterations.tex"), latex(lines).encode())
    write_bytes(str(out_dir / "index.html"), page.encode())
    return out_dir / "index.html"


def summary(lines: Sequence[Line]) -> str:
    """One trajectory in a sentence or two, from its first to its last finished iteration."""
    first, last = lines[0], lines[-1]
    if last["iteration"] == 0:
        return "Only the unpruned model has been measured so far."
    parts = []
    if first["layers"] and last["layers"]:
        share = 1 - last["layers"] / first["layers"]
        parts.append(f"{first['layers']} → {last['layers']} layers ({share:.0%} removed)")
    if first["parameters"] and last["parameters"]:
        share = 1 - last["parameters"] / first["parameters"]
        parts.append(f"{_millions(first)} → {_millions(last)} parameters ({share:.0%} fewer)")
    for metric in metric_columns(lines):
        if last[metric] is None or first[metric] is None:
            continue
        note = (
            f", {show(last[before(metric)])} before recovery" if last.get(before(metric)) is not None else ""
        )
        factor = f" (×{last[metric] / first[metric]:.2f}{note})" if is_perplexity(metric) else ""
        parts.append(f"{metric} {show(first[metric])} → {show(last[metric])}{factor}")
    return "; ".join(parts) + "."


def _section(trajectory: str, ledger: pa.Table, lines: Sequence[Line], figures: Path) -> dict[str, Any]:
    own = [line for line in lines if line["trajectory"] == trajectory]
    rows = ledger.filter(pc.field("trajectory") == trajectory)
    described = rows.select(["model", "method", "seed"]).slice(0, 1).to_pylist()[0]
    columns = [name for name in own[0] if name != "trajectory" and any(x[name] is not None for x in own)]
    return {
        "name": trajectory,
        **described,
        "summary": summary(own),
        "columns": columns,
        "rows": [[show(line[name]) for name in columns] for line in own],
        "charts": _draw(trajectory_charts(rows, own), figures, trajectory),
    }


def _draw(charts: Sequence[Chart | HeatMap], figures: Path, prefix: str) -> list[dict[str, Any]]:
    drawn = []
    for chart in charts:
        write_png(chart, figures / f"{prefix}-{chart.name}.png".replace("/", "-").replace(" ", "-"))
        drawn.append({"title": chart.title, "note": chart.note, "figure": Markup(interactive(chart))})
    return drawn


def _millions(line: Line) -> str:
    return f"{line['parameters'] / 1e6:,.1f} M"


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("orchestrator.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
