"""The report: one HTML file that needs no network, with figures and tables as files beside it."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from actors.artifacts import write_bytes
from orchestrator.report import explorer, provenance
from orchestrator.report.charts import Figure
from orchestrator.report.comparison_charts import comparison_charts
from orchestrator.report.comparisons import Grid, comparison_grids, entries
from orchestrator.report.figures import interactive, write_files
from orchestrator.report.measured import Measured, Number, measured_models, outcomes
from orchestrator.report.summary import best_at_each_size, of_trajectory
from orchestrator.report.tables import Line, csv, iteration_table, latex, markdown, show
from orchestrator.report.trajectory_charts import trajectory_charts


@dataclass(frozen=True)
class Source:
    """What a report is made of.

    Attributes:
        ledger: all rows of the run so far.
        config: the configuration that the run was started with.
        versions: of the packages, when it was started.
        planned: iterations of each trajectory, by its id, as far as known.
        failures: reason of every trajectory that failed.
    """

    ledger: pa.Table
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    planned: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


def build_report(source: Source, out_dir: Path) -> Path:
    """Write `index.html`, `tables/*.{md,tex,csv}` and `figures/*.{png,svg}`; return the page.

    An unfinished or empty run gives a report of what there is so far.
    """
    for folder in ("figures", "tables"):
        (out_dir / folder).mkdir(parents=True, exist_ok=True)
    models = in_order_of(source.config, measured_models(source.ledger))
    grids = comparison_grids(source.ledger, models, source.config)
    trajectories = dict.fromkeys(
        [*(m.trajectory for m in models), *pc.unique(source.ledger["trajectory"]).to_pylist()]
    )
    stages = provenance.stages_of(source.ledger)
    page = _environment(stages).get_template("report.html.j2").render(
        name=source.config.get("name", "campaign"),
        progress=progress(models, source),
        failures=source.failures,
        best=best_at_each_size(entries(models)),
        explorer=explorer.describe(outcomes(models)),
        grids=[_with_files(grid, out_dir / "tables") for grid in grids],
        comparison=_draw(comparison_charts(models), out_dir / "figures", "all"),
        sections=[_section(name, source.ledger, models, out_dir) for name in trajectories],
        stages=stages,
        config=yaml.safe_dump(dict(source.config), sort_keys=False, allow_unicode=True),
        versions=source.versions,
        updated=pc.max(source.ledger["when"]).as_py(),
        plotly_js=Markup(get_plotlyjs()),
    )  # fmt: skip
    write_bytes(str(out_dir / "index.html"), page.encode())
    return out_dir / "index.html"


def in_order_of(config: Mapping[str, Any], models: Sequence[Measured]) -> list[Measured]:
    """The models with the sources and methods in the order in which the configuration lists them."""
    sources = {model["id"]: rank for rank, model in enumerate(config.get("models") or [])}
    methods = {method["name"]: rank for rank, method in enumerate(config.get("methods") or [])}
    return sorted(
        models, key=lambda m: (sources.get(m.model, len(sources)), methods.get(m.method, len(methods)))
    )


@dataclass(frozen=True)
class Progress:
    """Iterations measured to the end, of those planned."""

    done: int
    total: int

    @property
    def percent(self) -> int:
        return 100 * self.done // self.total if self.total else 0


def progress(models: Iterable[Measured], source: Source) -> Progress | None:
    """How far the run is; None where the plan is not known."""
    if not source.planned:
        return None
    finished = {(m.trajectory, m.iteration) for m in outcomes(models) if m.iteration > 0}
    return Progress(len(finished), sum(source.planned.values()))


def _section(trajectory: str, ledger: pa.Table, models: Sequence[Measured], out_dir: Path) -> dict[str, Any]:
    rows = ledger.filter(pc.field("trajectory") == trajectory)
    own = [model for model in models if model.trajectory == trajectory]
    described = rows.select(["model", "method", "seed"]).slice(0, 1).to_pylist()[0]
    lines = iteration_table(rows)
    lines = [{name: value for name, value in line.items() if name != "trajectory"} for line in lines]
    present = [name for name in (lines[0] if lines else ()) if any(line[name] is not None for line in lines)]
    grid = Grid(f"iterations-{trajectory}", "", "", tuple({n: line[n] for n in present} for line in lines))
    return {
        "name": trajectory,
        **described,
        "summary": of_trajectory(own),
        "grid": _with_files(grid, out_dir / "tables"),
        "charts": _draw(trajectory_charts(rows, own), out_dir / "figures", trajectory),
    }


def _with_files(grid: Grid, folder: Path) -> Grid:
    """The grid itself, once it lies in `folder` as Markdown, LaTeX and CSV."""
    lines: Sequence[Line] = grid.lines
    for ending, text in (("md", markdown(lines)), ("tex", latex(lines, grid.best)), ("csv", csv(lines))):
        write_bytes(str(folder / f"{file_name(grid.name)}.{ending}"), text.encode())
    return grid


def _draw(figures: Sequence[Figure], folder: Path, prefix: str) -> list[dict[str, Any]]:
    drawn = []
    for figure in figures:
        write_files(figure, folder / file_name(f"{prefix}-{figure.name}"))
        drawn.append({"title": figure.title, "note": figure.note, "figure": Markup(interactive(figure))})
    return drawn


def file_name(name: str) -> str:
    """`name` with nothing in it that a path could trip over."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _environment(stages: Mapping[str, provenance.Stage]) -> Environment:
    environment = Environment(
        loader=PackageLoader("orchestrator.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )

    def cell(value: Any) -> str | Markup:
        """A number links to the stage that measured it."""
        if not isinstance(value, Number):
            return show(value)
        text, stage = show(value.value), stages.get(value.key)
        error = "" if value.stderr is None else f" ± {show(value.stderr)}"
        if stage is None:
            return text
        return Markup('<a href="#{}" title="{}{} · {}">{}</a>').format(
            stage.anchor, text, error, stage.told, text
        )

    environment.filters["cell"] = cell
    environment.filters["json"] = lambda value: Markup(json.dumps(value).replace("</", "<\\/"))
    return environment
