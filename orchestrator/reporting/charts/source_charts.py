"""Figures of one source model: methods side by side, what each of them dropped, and what its layers do."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from actors.contracts import SCORE_METRICS
from orchestrator.reporting.charts.charts import Curve, Figure, HeatMap, Panel, chart, figure
from orchestrator.reporting.charts.method_charts import LEAST_DEPTHS, dropped_layers, removed_layers
from orchestrator.reporting.data.comparisons import NOT_PRUNED, Entry, dense_of
from orchestrator.reporting.data.measured import DENSE, PRUNED, RECOVERED, headline_metrics

MOST_PANELS, LEAST_METHODS = 12, 2
PHASES = {DENSE: "unpruned", RECOVERED: "recovered", PRUNED: "before recovery"}
ANGULAR = "angular_block"
RUN_CRITERIA = (ANGULAR, "bridge_residual")
"""The criteria that score a run of layers by where it begins."""
FIRST_SCORE = (
    (pc.field("stage") == "score")
    & pc.field("metric").isin(list(SCORE_METRICS.values()))
    & (pc.field("iteration") == 1)
)


def source_figures(
    source: str, ledger: pa.Table, found: Sequence[Entry], methods: Sequence[str], criteria: Mapping[str, str]
) -> list[Figure]:
    """Return all figures of one source model for which there are numbers.

    Args:
        ledger: rows of this source alone.
        found: its entries, the unpruned model among them.
        methods: all of the campaign, in order: they keep their colours.
        criteria: of each method, the criterion that it scores layers by.
    """
    figures = [
        _over_share(source, found, methods),
        _dropped_map(source, ledger, found, methods),
        _first_scores(source, ledger, criteria),
        _run_distances(source, ledger, criteria),
    ]
    return [drawn for drawn in figures if drawn is not None]


def _over_share(source: str, found: Sequence[Entry], methods: Sequence[str]) -> Figure | None:
    """Plot every headline metric over the share of layers removed, a curve a method.

    As the accuracy curves of *The Unreasonable Ineffectiveness of the Deeper Layers* (Figure 1). One method
    has this in its own figures, and of one depth a bar a method says it.
    """
    dense = dense_of(source, found)
    recovered = [entry for entry in found if entry.phase == RECOVERED]
    pruned = [entry for entry in found if entry.phase == PRUNED]
    if dense is None or len({entry.method for entry in recovered}) < LEAST_METHODS:
        return None
    metrics = headline_metrics(found)[:MOST_PANELS]
    if len({entry.layers for entry in recovered}) < LEAST_DEPTHS:
        return figure(
            f"compare-{source}",
            f"{source}: methods at {recovered[0].layers} of {dense.layers} layers",
            "Arrows say which way is better; lines at the bars' ends are one standard error.",
            [_method_bars(metric, [dense, *recovered, *pruned], methods) for metric in metrics],
            palette=tuple(PHASES.values()),
        )
    panels = []
    for metric in metrics:
        curves = [
            _method_curve(method, metric, found, dense, phase)
            for method in methods
            for phase in (RECOVERED, PRUNED)
        ]
        panels.append(chart("", "layers removed, %", "", curves, metric=metric))
    return figure(
        f"compare-{source}",
        f"{source}: methods over the share removed",
        "As Figure 1 of The Unreasonable Ineffectiveness of the Deeper Layers. Dashed: the same models "
        "before recovery, where that differs. Arrows say which way is better; bars are one standard error.",
        panels,
        palette=methods,
    )


def _method_bars(metric: str, found: Sequence[Entry], methods: Sequence[str]) -> Panel | None:
    """Plot a metric of every method, a bar a state of its model."""
    curves = []
    for phase, name in PHASES.items():
        points = {
            entry.method: entry.numbers[metric]
            for entry in sorted(found, key=lambda entry: [NOT_PRUNED, *methods].index(entry.method))
            if entry.phase == phase and metric in entry.numbers
        }
        errors = tuple(number.stderr or 0.0 for number in points.values())
        values = tuple(number.value for number in points.values())
        curves.append(Curve(name, tuple(points), values, stderr=errors if any(errors) else None))
    return chart("", "", "", curves, "bars", metric)


def _method_curve(method: str, metric: str, found: Sequence[Entry], dense: Entry, phase: str) -> Curve | None:
    points = {
        100 * (1 - entry.layers / dense.layers): entry.numbers[metric]
        for entry in (dense, *found)
        if (entry is dense or (entry.method, entry.phase) == (method, phase)) and metric in entry.numbers
    }
    # Without recovery, or where it changed nothing, both curves would be one.
    before, after = (
        {
            entry.layers: entry.numbers[metric].value
            for entry in found
            if (entry.method, entry.phase) == (method, state) and metric in entry.numbers
        }
        for state in (PRUNED, RECOVERED)
    )
    if len(points) < 2 or (phase == PRUNED and before == after):
        return None
    xs = tuple(sorted(points))
    errors = tuple(points[x].stderr or 0.0 for x in xs)
    name = method if phase == RECOVERED else f"{method}, before recovery"
    return Curve(
        name,
        xs,
        tuple(points[x].value for x in xs),
        dashed=phase == PRUNED,
        stderr=errors if any(errors) and phase == RECOVERED else None,
        group=method,
    )


def _dropped_map(
    source: str, ledger: pa.Table, found: Sequence[Entry], methods: Sequence[str]
) -> Figure | None:
    """Map when each layer was dropped: a row a method (and seed, where they differ)."""
    dropped, removed = dropped_layers(ledger), removed_layers(ledger)
    if not dropped:
        return None
    columns = ["trajectory", "method", "seed"]
    seeds: dict[tuple[str, int], dict[int, int]] = {}
    for row in ledger.group_by(columns, use_threads=False).aggregate([]).to_pylist():
        went = seeds.setdefault((row["method"], row["seed"]), {})
        for place in (key for key in dropped if key[0] == row["trajectory"]):
            # Of the trajectories of a direct schedule, the one with the nearest target counts.
            went |= {layer: min(removed[place], went.get(layer, removed[place])) for layer in dropped[place]}
    rows: dict[str, dict[int, int]] = {}
    rank = {method: place for place, method in enumerate(methods)}
    for (method, seed), went in sorted(seeds.items(), key=lambda one: rank.get(one[0][0], len(rank))):
        if went and went != rows.get(method):
            rows[method if method not in rows else f"{method}, seed {seed}"] = went
    deepest = max(layer for went in rows.values() for layer in went)
    layers = tuple(range(max(deepest + 1, *(entry.layers for entry in found if entry.phase == DENSE), 0)))
    panel = HeatMap(
        title=source,
        x_title="source layer",
        y_title="",
        x=layers,
        y=tuple(rows),
        values=tuple(tuple(went.get(layer) for layer in layers) for went in rows.values()),
        value_title="layers removed when it went",
    )
    return figure(
        f"dropped-{source}",
        f"{source}: which layers went",
        "A row a method, a column a layer of the unpruned model: the colour says when it went, empty cells "
        "stayed. Seeds have a row of their own where they dropped others.",
        [panel],
    )


def _first_scores(source: str, ledger: pa.Table, criteria: Mapping[str, str]) -> Figure | None:
    """Plot the scores of all layers of the unpruned model, a panel a criterion."""
    scored: dict[str, dict[str, dict[int, float]]] = {}
    methods: dict[str, str] = {}
    for row in ledger.filter(FIRST_SCORE).select(["method", "key", "metric", "layer", "value"]).to_pylist():
        kind = row["metric"].replace("_", " ")
        scored.setdefault(row["key"], {}).setdefault(kind, {})[row["layer"]] = row["value"]
        methods.setdefault(row["key"], row["method"])
    panels: dict[str, Panel | None] = {}
    for key, scores in scored.items():
        name = criteria.get(methods[key], methods[key])
        if name in RUN_CRITERIA:
            continue
        curves = [
            Curve(kind, tuple(sorted(of_kind)), tuple(of_kind[layer] for layer in sorted(of_kind)))
            for kind, of_kind in sorted(scores.items())
        ]
        panels.setdefault(name, chart(name, "source layer", "score", curves))
    return figure(
        f"criteria-{source}",
        f"{source}: every layer by each criterion",
        "The first scoring of the unpruned model, a panel a criterion with a scale of its own. For "
        "hidden_cosine, perplexity, kl and task_metric it is a sweep: the model without that one layer. "
        "A bound is the best that the score of a layer can be that was given up early.",
        panels.values(),
    )


def _run_distances(source: str, ledger: pa.Table, criteria: Mapping[str, str]) -> Figure | None:
    """Map angular distances over runs of as many layers as were taken at once (Gromov et al., Figure 4)."""
    angular = {method for method, criterion in criteria.items() if criterion == ANGULAR}
    sizes_of = {place[0]: len(layers) for place, layers in dropped_layers(ledger).items() if place[1] == 1}
    found: dict[int, dict[int, float]] = {}
    for row in ledger.filter(FIRST_SCORE).select(["method", "trajectory", "layer", "value"]).to_pylist():
        if row["method"] in angular and row["trajectory"] in sizes_of:
            found.setdefault(sizes_of[row["trajectory"]], {})[row["layer"]] = row["value"]
    # No run begins at the last n - 1 layers.
    found = {
        size: {start: distances[start] for start in sorted(distances)[: len(distances) - size + 1]}
        for size, distances in found.items()
    }
    if len(found) < 2:
        return None
    starts = tuple(sorted({start for distances in found.values() for start in distances}))
    sizes = tuple(sorted(found, reverse=True))
    rows: list[tuple[float | None, ...]] = []
    for size in sizes:
        low, high = min(found[size].values()), max(found[size].values())
        rescaled = {start: (value - low) / ((high - low) or 1.0) for start, value in found[size].items()}
        rows.append(tuple(map(rescaled.get, starts)))
    panel = HeatMap(
        title=source,
        x_title="first layer of the run",
        y_title="layers in the run",
        x=starts,
        y=sizes,
        values=tuple(rows),
        value_title="angular distance, each row from 0 to 1",
        marked=tuple((min(found[size], key=found[size].__getitem__), size) for size in sizes),
    )
    return figure(
        f"angular-{source}",
        f"{source}: angular distance over runs of layers",
        "As Figure 4 of The Unreasonable Ineffectiveness of the Deeper Layers: how much a run of layers "
        "turns the hidden state of the unpruned model, for the lengths that a method scored. A cross marks "
        "the least of each.",
        [panel],
    )


def sweep_figures(sweeps: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return a figure a single-layer sweep (`iterabre sweep`): a panel a metric (*Limits*, §3).

    Args:
        sweeps: contents of `sweep.json`.
    """
    figures = []
    for number, sweep in enumerate(sweeps, 1):
        layers = tuple(sweep["layers"])
        panels = [
            chart(
                "",
                "removed layer",
                sweep["units"].get(name) or "",
                [
                    Curve("without this layer", layers, tuple(values)),
                    Curve("unpruned", (min(layers), max(layers)), (sweep["dense"][name],) * 2, dashed=True),
                ],
                metric=name,
            )
            for name, values in sweep["metrics"].items()
        ]
        model = str(sweep["model"]).rsplit("/", 1)[-1]
        note = "Each layer of the unpruned model removed by itself (On the Limits of Layer Pruning, §3)."
        figures.append(figure(f"sweep-{number}-{model}", f"{model}: one layer removed", note, panels))
    return [drawn for drawn in figures if drawn is not None]
