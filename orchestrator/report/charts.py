"""What each figure shows, as data; `figures` draws it for the browser or for print."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.report.tables import Line, before, is_perplexity, metric_columns

LOG_SCALE_FROM_RATIO = 8.0


@dataclass(frozen=True)
class Curve:
    """One line of a chart; `stderr`, if any, has one value per point."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    dashed: bool = False
    stderr: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Chart:
    """Curves over a common axis. `name` is used for the file, `note` tells how to read it."""

    name: str
    title: str
    note: str
    x_title: str
    y_title: str
    curves: tuple[Curve, ...]
    log_y: bool = False


@dataclass(frozen=True)
class HeatMap:
    """`values[row][column]`, None where there is nothing; `marked` holds (x, y) of crossed cells."""

    name: str
    title: str
    note: str
    x_title: str
    y_title: str
    x: tuple[int, ...]
    y: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    marked: tuple[tuple[int, int], ...]


def trajectory_charts(ledger: pa.Table, lines: Sequence[Line]) -> list[Chart | HeatMap]:
    """The figures of one trajectory; those without data are left out.

    `ledger` and `lines` (of `iteration_table`) hold this trajectory alone.
    """
    charts = [
        *_perplexity_charts(lines),
        _accuracy_chart(ledger, lines),
        _loss_chart(ledger),
        _score_map(ledger),
    ]
    return [chart for chart in charts if chart is not None]


def comparison_charts(lines: Sequence[Line]) -> list[Chart]:
    """Every metric over the depth, one curve per trajectory."""
    trajectories = list(dict.fromkeys(line["trajectory"] for line in lines))
    charts = []
    for metric in metric_columns(lines):
        if metric == before(metric.removesuffix(" before recovery")):
            continue
        curves = [
            _curve(t, "layers", metric, [x for x in lines if x["trajectory"] == t]) for t in trajectories
        ]
        better = "lower" if is_perplexity(metric) else "higher"
        note = f"After recovery, where there was any; {better} is better." if _has_direction(metric) else ""
        charts.append(_chart(f"compare-{metric}", metric, note, "layers left", metric, curves))
    return [chart for chart in charts if chart is not None]


def _perplexity_charts(lines: Sequence[Line]) -> list[Chart | None]:
    charts = []
    for metric in filter(is_perplexity, metric_columns(lines)):
        pruned = [line for line in lines if line["iteration"] > 0]
        curves = [
            _curve("before recovery", "iteration", before(metric), pruned),
            _curve("after recovery", "iteration", metric, pruned),
            _dense(lines, metric),
        ]
        note = "Lower is better. The dashed line is the unpruned model."
        charts.append(_chart(metric, metric, note, "iteration", "perplexity", curves))
    return charts


def _accuracy_chart(ledger: pa.Table, lines: Sequence[Line]) -> Chart | None:
    metrics = [name for name in metric_columns(lines) if _is_accuracy(name)]
    stderr = {
        (row["metric"], row["iteration"], row["value"]): row["stderr"]
        for row in ledger.filter(pc.field("stage") == "evaluate").to_pylist()
    }
    curves = []
    for metric in metrics:
        errors = [stderr.get((metric, x["iteration"], x[metric])) for x in lines if x[metric] is not None]
        curves.append(
            _curve(metric, "iteration", metric, lines, [e or 0.0 for e in errors] if any(errors) else None)
        )
    note = "Higher is better. Iteration 0 is the unpruned model; bars are one standard error."
    return _chart("accuracy", "Task accuracy", note, "iteration", "accuracy", curves)


def _loss_chart(ledger: pa.Table) -> Chart | None:
    steps = ledger.filter((pc.field("stage") == "recover") & (pc.field("metric") == "loss"))
    steps = steps.filter(pc.is_valid(steps["step"])).sort_by(
        [("iteration", "ascending"), ("step", "ascending")]
    )
    curves = []
    for iteration in pc.unique(steps["iteration"]).to_pylist():
        part = steps.filter(pc.field("iteration") == iteration)
        curves.append(Curve(f"iteration {iteration}", _numbers(part, "step"), _numbers(part, "value")))
    note = "Distillation loss at each optimizer step, one curve per iteration."
    return _chart("recovery-loss", "Recovery", note, "optimizer step", "loss", curves)


def _score_map(ledger: pa.Table) -> HeatMap | None:
    def by_place(stage: str, metric: str) -> dict[tuple[int, int], float]:
        rows = ledger.filter((pc.field("stage") == stage) & (pc.field("metric") == metric)).to_pylist()
        return {(row["layer"], row["iteration"]): row["value"] for row in rows}

    scores = by_place("score", "score")
    if not scores:
        return None
    x, y = (tuple(sorted(set(values))) for values in zip(*scores, strict=True))
    return HeatMap(
        name="layer-scores",
        title="Layer scores",
        note="Score of every layer that was still there, by its index in the unpruned model. A cross marks "
        "what was dropped; empty cells were dropped before.",
        x_title="source layer",
        y_title="iteration",
        x=x,
        y=y,
        values=tuple(tuple(scores.get((layer, iteration)) for layer in x) for iteration in y),
        marked=tuple(place for place in by_place("prune", "dropped") if place in scores),
    )


def _chart(
    name: str, title: str, note: str, x_title: str, y_title: str, curves: Sequence[Curve | None]
) -> Chart | None:
    drawn = tuple(curve for curve in curves if curve is not None and curve.x)
    if not drawn:
        return None
    values = [value for curve in drawn for value in curve.y if value > 0]
    # Accuracies are compared on a linear scale, whatever their range.
    log_y = not _is_accuracy(name) and bool(values) and max(values) > LOG_SCALE_FROM_RATIO * min(values)
    return Chart(name, title, note, x_title, y_title, drawn, log_y)


def _curve(
    name: str, x: str, y: str, lines: Sequence[Line], stderr: Sequence[float] | None = None
) -> Curve | None:
    points = [(line[x], line[y]) for line in lines if line.get(x) is not None and line.get(y) is not None]
    if not points:
        return None
    xs, ys = zip(*points, strict=True)
    return Curve(name, xs, ys, stderr=None if stderr is None else tuple(stderr))


def _dense(lines: Sequence[Line], metric: str) -> Curve | None:
    """The unpruned model's value, drawn across the whole chart."""
    dense = next((line[metric] for line in lines if line["iteration"] == 0), None)
    iterations = [line["iteration"] for line in lines if line["iteration"] > 0]
    if dense is None or not iterations:
        return None
    return Curve("unpruned", (min(iterations), max(iterations)), (dense, dense), dashed=True)


def _is_accuracy(metric: str) -> bool:
    return "acc" in metric.rsplit("/", 1)[-1]


def _has_direction(metric: str) -> bool:
    return is_perplexity(metric) or _is_accuracy(metric)


def _numbers(table: pa.Table, column: str) -> tuple[Any, ...]:
    return tuple(table[column].to_pylist())
