"""The single-layer sweep: every layer removed once, and what that does (*Limits of Layer Pruning*, §3)."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from actors.contracts import EvaluationResult, EvaluationSpec, Progress, no_progress, to_json
from actors.evaluation.layer_sweep import evaluate_prunings
from orchestrator.execution.task_scoring import EvaluateAll
from orchestrator.reporting.charts.figures import COLOURS


@dataclass(frozen=True)
class Sweep:
    """The unpruned model's metrics, and those without each layer.

    `metrics[name]` holds one value a layer of `layers`, `dense[name]` the unpruned
    model's value, `units[name]` their unit.
    """

    model: str
    layers: tuple[int, ...]
    dense: dict[str, float]
    metrics: dict[str, tuple[float, ...]]
    units: dict[str, str]

    def changes(self, name: str) -> tuple[float, ...]:
        """Return the metric without each layer less that of the unpruned model."""
        return tuple(value - self.dense[name] for value in self.metrics[name])


def run_sweep(
    spec: EvaluationSpec,
    layers: Sequence[int],
    evaluate_all: EvaluateAll | None = None,
    progress: Progress = no_progress,
) -> Sweep:
    """Measure `spec.model` as it is, and without each of `layers`, on what `spec` requests.

    Args:
        spec: of an unpruned model.
        layers: source layer indices.
        evaluate_all: evaluates specs in any order and gives each result with its
            spec's position; in this process if None, with the model loaded once.
    """
    specs = [spec, *(replace(spec, model=spec.model.without((layer,))) for layer in layers)]
    results: dict[int, EvaluationResult] = {}
    progress(0, len(specs), "models")
    for position, result in (evaluate_all or evaluate_prunings)(specs):
        results[position] = result
        progress(len(results), len(specs), "models")
    values = [{m.name: m.value for m in results[position].metrics} for position in range(len(specs))]
    dense, *pruned = values
    return Sweep(
        spec.model.source.path,
        tuple(layers),
        dense,
        {name: tuple(found[name] for found in pruned) for name in dense},
        {metric.name: metric.unit for metric in results[0].metrics},
    )


def sweep_columns(sweep: Sweep) -> dict[str, list[str]]:
    """Return a column a metric, the unpruned model in the first row; as text for a terminal."""
    columns = {"removed": ["none", *map(str, sweep.layers)]}
    for name, values in sweep.metrics.items():
        columns[name.replace("/", " ").replace("_", " ")] = [
            f"{value:.4f}" for value in (sweep.dense[name], *values)
        ]
    return columns


def write_sweep(sweep: Sweep, directory: Path) -> list[Path]:
    """Write `sweep.json`, `sweep.csv` (the unpruned model first), `sweep.png` and `sweep.svg`."""
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / f"sweep.{kind}" for kind in ("json", "csv", "png", "svg")]
    files[0].write_text(json.dumps(to_json(sweep), indent=2) + "\n", encoding="utf-8")
    with files[1].open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["removed_layer", *sweep.dense])
        writer.writerow(["none", *sweep.dense.values()])
        for row, layer in enumerate(sweep.layers):
            writer.writerow([layer, *(values[row] for values in sweep.metrics.values())])
    figure = sweep_figure(sweep)
    for file in files[2:]:
        figure.savefig(file, dpi=150)
    return files


def sweep_figure(sweep: Sweep) -> Figure:
    """Draw a panel a metric over the removed layer; the dashed line is the unpruned model."""
    names = list(sweep.dense)
    columns = 1 if len(names) < 3 else 2
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(6.5 * columns, 2.6 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for index, (panel, name) in enumerate(zip(panels, names, strict=False)):
        colour = COLOURS[index % len(COLOURS)]
        panel.plot(sweep.layers, sweep.metrics[name], marker="o", markersize=3.5, color=colour)
        panel.axhline(sweep.dense[name], linestyle="--", linewidth=1, color="#444444")
        panel.set_title(f"{name} ({sweep.units[name]})" if sweep.units[name] else name, fontsize=10)
        panel.grid(alpha=0.3)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel in panels[max(len(names) - columns, 0) : len(names)]:
        panel.set_xlabel("removed layer")
        panel.xaxis.set_tick_params(labelbottom=True)
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(
        f"{sweep.model.rsplit('/', 1)[-1]}, one layer removed at a time (dashed: unpruned)", fontsize=11
    )
    return figure
