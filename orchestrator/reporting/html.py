"""The report: one HTML file that needs no network, with figures and tables as files beside it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from actors.artifacts import write_bytes
from orchestrator.reporting import explorer
from orchestrator.reporting.charts.charts import Figure, described
from orchestrator.reporting.charts.figures import SEQUENCE, colours_of, write_all
from orchestrator.reporting.charts.method_charts import method_figures
from orchestrator.reporting.charts.source_charts import source_figures, sweep_figures
from orchestrator.reporting.data import provenance
from orchestrator.reporting.data.accuracies import with_mean_accuracy
from orchestrator.reporting.data.comparisons import NOT_PRUNED, Entry, Grid, comparison_grids, entries
from orchestrator.reporting.data.due import due_models
from orchestrator.reporting.data.measured import RECOVERED, Measured, headline_metrics, measured_models
from orchestrator.reporting.page import environment, file_name
from orchestrator.reporting.run_source import Source
from orchestrator.reporting.tables.costs import cost_grid
from orchestrator.reporting.tables.metric_names import glossary
from orchestrator.reporting.tables.summary import best_at_each_size, of_method
from orchestrator.reporting.tables.tables import (
    LEADING,
    STAGES,
    before,
    csv,
    is_perplexity,
    iteration_numbers,
    latex,
    markdown,
)


def build_report(source: Source, out_dir: Path) -> Path:
    """Write `index.html`, `tables/*.{md,tex,csv}` and `figures/*.{png,svg}`; return the page.

    An unfinished or empty run gives a report of what there is so far.
    """
    for folder in ("figures", "tables"):
        (out_dir / folder).mkdir(parents=True, exist_ok=True)
    ledger = source.ledger.combine_chunks()
    models = with_mean_accuracy(in_order_of(source.config, measured_models(ledger)))
    found = entries(models)
    grids = [*comparison_grids(ledger, models, source.config), cost_grid(ledger)]
    due = due_models(ledger, models, source.trajectories, [*source.failures, *source.given_up])
    stages = provenance.stages_of(ledger, source.stages)
    drawn, sources = Drawn(out_dir / "figures"), dict.fromkeys(model.model for model in models)
    # A section a source and method, in the order of the models; those not measured yet come last.
    places = dict.fromkeys((m.model, m.method) for m in models)
    begun = ledger.group_by(["model", "method"], use_threads=False).aggregate([]).to_pylist()
    places |= dict.fromkeys((row["model"], row["method"]) for row in begun)
    written = source.config.get("runs") or dict(source.config)
    page = environment(stages).get_template("report.html.j2").render(
        name=source.config.get("name", "campaign"),
        progress=progress(models, source),
        scope=scope(ledger),
        failures=source.failures,
        notes=source.notes,
        best=best_at_each_size(found, due, source.exports),
        explorer=explorer.describe(found),
        glossary=glossary(headline_metrics(found)),
        grids=[_with_files(grid, out_dir / "tables") for grid in grids if grid is not None],
        sources=[_source(name, ledger, found, source, drawn) for name in sources],
        sections=[_section(*place, ledger, models, out_dir, drawn) for place in places],
        sweeps=[drawn.add("", figure) for figure in sweep_figures(source.sweeps)],
        stages=stages,
        config=yaml.safe_dump(written, sort_keys=False, allow_unicode=True) if written else "",
        versions=source.versions,
        hashes=source.hashes,
        updated=pc.max(ledger["when"]).as_py(),
        sequence=SEQUENCE,
        plotly_js=Markup(get_plotlyjs()),
    )  # fmt: skip
    # The page first: the figures for print take far longer.
    write_bytes(str(out_dir / "index.html"), page.encode())
    write_all(drawn.files)
    return out_dir / "index.html"


class Drawn:
    """The figures of a page and the files in `folder` that they will be written to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: list[tuple[Figure, Path]] = []

    def add(self, prefix: str, figure: Figure) -> dict[str, Any]:
        """Add a figure and return what the page shows of it."""
        stem = file_name(f"{prefix}-{figure.name}" if prefix else figure.name)
        self.files.append((figure, self._folder / stem))
        return {
            "title": figure.title,
            "note": figure.note,
            "file": stem,
            "data": described(figure, colours_of(figure)),
        }


def in_order_of(config: Mapping[str, Any], models: Sequence[Measured]) -> list[Measured]:
    """Sort the models by the order in which the configuration lists sources and methods."""
    sources = {model["id"]: rank for rank, model in enumerate(config.get("models") or [])}
    methods = {method["name"]: rank for rank, method in enumerate(config.get("methods") or [])}
    return sorted(
        models, key=lambda m: (sources.get(m.model, len(sources)), methods.get(m.method, len(methods)))
    )


@dataclass(frozen=True)
class Progress:
    """Models measured after their recovery, of those planned; `waiting` trajectories have none yet."""

    done: int
    total: int
    waiting: int = 0

    @property
    def percent(self) -> int:
        return 100 * self.done // self.total if self.total else 0


def progress(models: Iterable[Measured], source: Source) -> Progress | None:
    """Return how far the run is, without what failed or was given up; None where the plan is not known."""
    planned = {one["trajectory"]: len(one["depths"]) for one in source.trajectories} or source.planned
    ended = {*source.failures, *source.given_up}
    planned = {trajectory: count for trajectory, count in planned.items() if trajectory not in ended}
    if not planned:
        return None
    recovered = [model for model in models if model.phase == RECOVERED and model.trajectory in planned]
    finished = {(model.trajectory, model.iteration) for model in recovered}
    begun = {trajectory for trajectory, _ in finished}
    return Progress(len(finished), sum(planned.values()), len(planned.keys() - begun))


def scope(ledger: pa.Table) -> dict[str, int]:
    """Count how many of each the ledger has rows of."""
    counts = {f"{name}s": len(pc.unique(ledger[name])) for name in ("model", "method", "seed")}
    return counts | {"rows": ledger.num_rows}


def _source(
    name: str, ledger: pa.Table, found: Sequence[Entry], source: Source, drawn: Drawn
) -> dict[str, Any]:
    methods = list(dict.fromkeys(entry.method for entry in found if entry.method != NOT_PRUNED))
    criteria = {
        method["name"]: (method.get("scoring") or {}).get("criterion", method["name"])
        for method in source.config.get("methods") or []
    }
    own = [entry for entry in found if entry.model == name]
    rows = ledger.filter(pc.field("model") == name)
    figures = source_figures(name, rows, own, methods, criteria)
    return {"name": name, "figures": [drawn.add("all", figure) for figure in figures]}


def _section(
    model: str, method: str, ledger: pa.Table, models: Sequence[Measured], out_dir: Path, drawn: Drawn
) -> dict[str, Any]:
    rows = ledger.filter((pc.field("model") == model) & (pc.field("method") == method))
    own = [one for one in models if (one.model, one.method) == (model, method)]
    lines = iteration_numbers(rows)
    several = len({line["trajectory"] for line in lines}) > 1
    present = [
        name
        for name in (lines[0] if lines else ())
        if any(line[name] is not None for line in lines) and (several or name != "trajectory")
    ]
    headlines = headline_metrics(own)
    # All metrics are in the files; those of a group's members would make the page's table endless.
    shown = {*LEADING, *headlines, *map(before, filter(is_perplexity, headlines))}
    shown = (shown | {f"{stage} s" for stage in STAGES}) - {"dropped score", "phase"}
    grid = Grid(
        f"iterations-{model}--{method}", "", "", tuple({n: line[n] for n in present} for line in lines)
    )
    return {
        "model": model,
        "method": method,
        "summary": of_method(entries(own)),
        "grid": _with_files(grid, out_dir / "tables"),
        "columns": [name for name in present if name in shown],
        "figures": [drawn.add(f"{model}--{method}", figure) for figure in method_figures(rows, own)],
    }


def _with_files(grid: Grid, folder: Path) -> Grid:
    """Write the grid to `folder` as Markdown, LaTeX and CSV, and return it."""
    marks = (grid.lines, grid.best, grid.even)
    for ending, text in (("md", markdown(*marks)), ("tex", latex(*marks)), ("csv", csv(grid.lines))):
        write_bytes(str(folder / f"{file_name(grid.name)}.{ending}"), text.encode())
    return grid
