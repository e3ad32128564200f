"""Figures that set trajectories of one source model side by side."""

from collections.abc import Sequence

from orchestrator.report.charts import Chart, Curve, chart
from orchestrator.report.comparisons import Entry, entries
from orchestrator.report.measured import DENSE, PRUNED, RECOVERED, Measured, direction, headline_metrics

MOST_CHARTS = 6


def comparison_charts(models: Sequence[Measured]) -> list[Chart]:
    """Every headline metric over the share of layers removed, a curve a method and a figure a source.

    As the accuracy curves of *The Unreasonable Ineffectiveness of the Deeper Layers* (Figure 1).
    """
    found = entries(models)
    charts = []
    for source in dict.fromkeys(entry.model for entry in found):
        own = [entry for entry in found if entry.model == source]
        charts += [_over_share(source, metric, own) for metric in headline_metrics(own)[:MOST_CHARTS]]
    return [one for one in charts if one is not None]


def _over_share(source: str, metric: str, own: Sequence[Entry]) -> Chart | None:
    dense = next((entry for entry in own if entry.phase == DENSE), None)
    if dense is None:
        return None
    methods = dict.fromkeys(entry.method for entry in own if entry.phase != DENSE)
    curves = [
        _method_curve(method, metric, own, dense, phase)
        for method in methods
        for phase in (RECOVERED, PRUNED)
    ]
    better = "lower" if direction(metric) == "lower" else "higher"
    note = f"{better.capitalize()} is better. Dashed: the same models before recovery, where that differs."
    return chart(
        f"compare-{source}-{metric}",
        f"{source}: {metric}",
        note,
        "layers removed, %",
        metric.rsplit("/", 1)[-1],
        curves,
    )


def _method_curve(method: str, metric: str, own: Sequence[Entry], dense: Entry, phase: str) -> Curve | None:
    points = sorted(
        (100 * (1 - entry.layers / dense.layers), entry.numbers[metric].value)
        for entry in (dense, *own)
        if (entry is dense or (entry.method, entry.phase) == (method, phase)) and metric in entry.numbers
    )
    if len(points) < 2 or (phase == PRUNED and not _heals(method, metric, own)):
        return None
    xs, ys = zip(*dict(points).items(), strict=True)
    name = method if phase == RECOVERED else f"{method}, before recovery"
    return Curve(name, xs, ys, dashed=phase == PRUNED)


def _heals(method: str, metric: str, own: Sequence[Entry]) -> bool:
    """Whether recovery changed the metric at all; without recovery, both curves would be one."""
    values = {
        phase: {
            e.layers: e.numbers[metric].value
            for e in own
            if (e.method, e.phase) == (method, phase) and metric in e.numbers
        }
        for phase in (PRUNED, RECOVERED)
    }
    return values[PRUNED] != values[RECOVERED]
