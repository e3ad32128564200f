"""The figures of one trajectory: quality over iterations, what each drop and each recovery did, layer scores,
losses, cost."""

from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from actors.evaluation.suites import BLIMP_GROUPS
from orchestrator.report.charts import Chart, Curve, Figure, HeatMap, chart
from orchestrator.report.measured import (
    DENSE,
    PRUNED,
    RECOVERED,
    Measured,
    direction,
    headline_metrics,
    metrics_of,
)
from orchestrator.report.tables import STAGES

LEAST_MEMBERS, MOST_MEMBERS = 3, 20
"""A group of fewer or more tasks has no figure of its own."""


def trajectory_charts(ledger: pa.Table, models: Sequence[Measured]) -> list[Figure]:
    """All figures of one trajectory for which there are numbers.

    Args:
        ledger: rows of this trajectory alone.
        models: its measured models, in order.
    """
    figures = [
        *(_phases(metric, models) for metric in headline_metrics(models)),
        *_member_charts(models),
        *(_changes(metric, models, dropped_layers(ledger)) for metric in headline_metrics(models)[:2]),
        _score_map(ledger),
        _losses(ledger),
        _cost(ledger),
    ]
    return [figure for figure in figures if figure is not None]


def _phases(metric: str, models: Sequence[Measured]) -> Chart | None:
    """A metric before and after each recovery (IteRABRe, Figures 2 and 3)."""
    curves = [
        _over_iterations("pruned, before recovery", metric, models, PRUNED),
        _over_iterations("recovered", metric, models, RECOVERED),
        _level("unpruned", metric, models),
    ]
    better = {"lower": "Lower is better", "higher": "Higher is better"}[direction(metric) or "higher"]
    note = f"{better}; bars are one standard error. The dashed line is the unpruned model."
    return chart(metric, metric, note, "iteration", metric.rsplit("/", 1)[-1], curves)


def _over_iterations(
    name: str, metric: str, models: Sequence[Measured], phase: str, with_errors: bool = True
) -> Curve | None:
    points = [m for m in models if m.phase == phase and metric in m.numbers]
    if not points:
        return None
    errors = [m.numbers[metric].stderr for m in points]
    return Curve(
        name,
        tuple(m.iteration for m in points),
        tuple(m.numbers[metric].value for m in points),
        stderr=tuple(error or 0.0 for error in errors) if with_errors and any(errors) else None,
    )


def _level(name: str, metric: str, models: Sequence[Measured]) -> Curve | None:
    """The unpruned model's value, drawn across the whole chart."""
    dense = next((m for m in models if m.phase == DENSE and metric in m.numbers), None)
    iterations = [m.iteration for m in models if m.iteration > 0]
    if dense is None or not iterations:
        return None
    value = dense.numbers[metric].value
    return Curve(name, (min(iterations), max(iterations)), (value, value), dashed=True)


def _member_charts(models: Sequence[Measured]) -> list[Chart | None]:
    """The members of each group of tasks, recovered (IteRABRe, Figures 4 and 5)."""
    charts = []
    for group, members in _groups(models).items():
        curves = [
            _over_iterations(_short(metric, group), metric, [*models], RECOVERED, with_errors=False)
            for metric in members
        ]
        note = "Recovered models, one curve a member. Higher is better."
        charts.append(chart(f"{group}-members", f"Inside {group}", note, "iteration", "accuracy", curves))
    return charts


def _groups(models: Sequence[Measured]) -> Mapping[str, list[str]]:
    """Metrics inside each group whose members are not too many to be told apart; of BLiMP its 13 groups."""
    names = [name for name in metrics_of(models) if name.endswith("/acc")]
    headlines = [name for name in headline_metrics(models) if name.endswith("/acc")]
    found = {}
    for headline in headlines:
        group = headline.removesuffix("/acc")
        inside = [name for name in names if name.startswith(f"{group}_")]
        parts = [name for name in inside if name.removesuffix("/acc") in BLIMP_GROUPS] or inside
        if LEAST_MEMBERS <= len(parts) <= MOST_MEMBERS:
            found[group] = parts
    return found


def _short(metric: str, group: str) -> str:
    return metric.removesuffix("/acc").removeprefix(f"{group}_").replace("_", " ")


def _changes(metric: str, models: Sequence[Measured], dropped: Mapping[int, Sequence[int]]) -> Chart | None:
    """What each drop cost and what each recovery won back (IteRABRe, Figure 8)."""
    values = {(m.iteration, m.phase): m.numbers[metric].value for m in models if metric in m.numbers}
    drops: list[tuple[str, float]] = []
    gains: list[tuple[str, float]] = []
    for iteration in sorted(dropped):
        label = f"{iteration}: {', '.join(map(str, dropped[iteration]))}"
        before = values.get((iteration - 1, RECOVERED), values.get((iteration - 1, DENSE)))
        pruned, recovered = values.get((iteration, PRUNED)), values.get((iteration, RECOVERED))
        if before is not None and pruned is not None:
            drops.append((label, pruned - before))
        if pruned is not None and recovered is not None:
            gains.append((label, recovered - pruned))
    curves = [
        Curve(name, tuple(label for label, _ in points), tuple(change for _, change in points))
        for name, points in (("pruning", drops), ("recovery", gains))
    ]
    note = (
        "Change of the metric by pruning and by recovery; below each pair, iteration: dropped source layers."
    )
    return chart(
        f"changes-{metric}", f"Change of {metric}", note, "iteration: layers", "change", curves, "bars"
    )


def dropped_layers(ledger: pa.Table) -> dict[int, list[int]]:
    """Source layers dropped in each iteration."""
    rows = ledger.filter((pc.field("stage") == "prune") & (pc.field("metric") == "dropped")).to_pylist()
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(row["iteration"], []).append(row["layer"])
    return {iteration: sorted(layers) for iteration, layers in found.items()}


def _losses(ledger: pa.Table) -> Chart | None:
    steps = ledger.filter((pc.field("stage") == "recover") & (pc.field("metric") == "loss"))
    steps = steps.filter(pc.is_valid(steps["step"])).sort_by(
        [("iteration", "ascending"), ("step", "ascending")]
    )
    curves = []
    for iteration in pc.unique(steps["iteration"]).to_pylist():
        part = steps.filter(pc.field("iteration") == iteration)
        curves.append(Curve(f"iteration {iteration}", _column(part, "step"), _column(part, "value")))
    note = "Training loss at each optimizer step, one curve an iteration; long runs as means of neighbours."
    return chart("recovery-loss", "Recovery", note, "optimizer step", "loss", curves)


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


def _cost(ledger: pa.Table) -> Chart | None:
    """Seconds of each kind of stage, iteration by iteration."""
    rows = ledger.filter(pc.field("metric") == "seconds").to_pylist()
    curves = [
        _bars(stage, [(row["iteration"], row["value"]) for row in rows if row["stage"] == stage])
        for stage in STAGES
    ]
    note = "Seconds of each stage when it was computed; stages found in the store cost nothing again."
    return chart("cost", "Cost by stage", note, "iteration", "seconds", curves, "stacked")


def _bars(name: str, points: Iterable[tuple[int, float]]) -> Curve | None:
    sums: dict[int, float] = {}
    for x, y in points:
        sums[x] = sums.get(x, 0.0) + y
    return Curve(name, tuple(sums), tuple(sums.values())) if sums else None


def _column(table: pa.Table, name: str) -> tuple[float, ...]:
    return tuple(table[name].to_pylist())
