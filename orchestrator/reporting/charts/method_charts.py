"""The figures of one method on one source model: quality over depth, groups of tasks, what each drop and each
recovery did, layer scores, losses, cost."""

from collections.abc import Mapping, Sequence
from statistics import mean

import pyarrow as pa
import pyarrow.compute as pc

from actors.contracts import SCORE_METRICS
from orchestrator.reporting.charts.charts import Chart, Curve, Figure, HeatMap, chart, figure
from orchestrator.reporting.data.comparisons import Entry, dense_of, entries
from orchestrator.reporting.data.measured import (
    DENSE,
    PRUNED,
    RECOVERED,
    Measured,
    direction,
    headline_metrics,
    metrics_of,
)
from orchestrator.reporting.tables.tables import STAGES

LEAST_MEMBERS, MOST_MEMBERS = 3, 20
"""A group of fewer or more tasks has no figure of its own."""
GROUPS = {
    "blimp": (
        "agreement", "distractor_agreement", "island_constraints", "movement_extraction", "wh_that",
        "passive_causative", "transitivity", "irregular_forms", "negation_npi", "quantifiers",
        "binding_theory", "ellipsis_argument", "coordinate_structures",
    ),
    "mmlu": ("humanities", "social_sciences", "stem", "other"),
}  # fmt: skip
"""Groups that stand for all: BLiMP's 67 paradigms (IteRABRe, App. C), MMLU's 57 subjects (lm-eval)."""
MOST_CURVES, MOST_SEEDS = 10, 4
LEAST_DEPTHS = 2
"""Of fewer, a figure over depth holds nothing that a table does not."""
REMOVED = "layers removed"


def method_figures(ledger: pa.Table, models: Sequence[Measured]) -> list[Figure]:
    """Return all figures of one method on one source for which there are numbers.

    Args:
        ledger: rows of this source's and method's trajectories.
        models: their measured models, in order.
    """
    found, removed = entries(models), removed_layers(ledger)
    figures = [
        figure(
            "performance",
            "Performance with and without recovery",
            "As Figures 2 and 3 of IteRABRe, a panel a metric: every model before and after its recovery, "
            "and the unpruned model as a line across. Bars are one standard error.",
            [_phases(metric, found) for metric in headline_metrics(found)],
        ),
        figure(
            "groups",
            "Inside groups of tasks",
            "Accuracy of the recovered models less that of the unpruned one: red is lost, blue is gained. As "
            "Figures 4 (BLiMP) and 5 (MMLU) of IteRABRe.",
            [_member_map(group, members, found) for group, members in _groups(found).items()],
        ),
        _changes(models, removed, dropped_layers(ledger)),
        _score_maps(ledger, removed),
        _losses(ledger, removed),
        _cost(ledger, removed),
    ]
    return [drawn for drawn in figures if drawn is not None]


def removed_layers(ledger: pa.Table) -> dict[tuple[str, int], int]:
    """Return the number of layers removed after each iteration of each trajectory."""
    removed: dict[tuple[str, int], int] = {}
    sums: dict[str, int] = {}
    for (trajectory, iteration), layers in sorted(dropped_layers(ledger).items()):
        sums[trajectory] = sums.get(trajectory, 0) + len(layers)
        removed[trajectory, iteration] = sums[trajectory]
    return removed


def dropped_layers(ledger: pa.Table) -> dict[tuple[str, int], list[int]]:
    """Return the source layers dropped in each iteration of each trajectory."""
    rows = ledger.filter((pc.field("stage") == "prune") & (pc.field("metric") == "dropped"))
    found: dict[tuple[str, int], list[int]] = {}
    for row in rows.select(["trajectory", "iteration", "layer"]).to_pylist():
        found.setdefault((row["trajectory"], row["iteration"]), []).append(row["layer"])
    return {place: sorted(layers) for place, layers in found.items()}


def _phases(metric: str, found: Sequence[Entry]) -> Chart | None:
    """Plot a metric before and after each recovery (IteRABRe, Figures 2 and 3)."""
    dense = dense_of(found[0].model, found) if found else None
    pruned = [entry for entry in found if entry.phase != DENSE and metric in entry.numbers]
    if len({entry.layers for entry in pruned}) < LEAST_DEPTHS:
        return None
    start = dense.layers if dense else max(entry.layers for entry in pruned)
    curves = [
        _over_depth("pruned, before recovery", metric, start, [e for e in pruned if e.phase == PRUNED]),
        _over_depth("recovered", metric, start, [e for e in pruned if e.phase == RECOVERED]),
    ]
    if dense and metric in dense.numbers:
        value, last = dense.numbers[metric].value, start - min(entry.layers for entry in pruned)
        curves.append(Curve("unpruned", (0, last), (value, value), dashed=True))
    return chart("", REMOVED, "", curves, metric=metric)


def _over_depth(name: str, metric: str, start: int, found: Sequence[Entry]) -> Curve:
    points = sorted(found, key=lambda entry: -entry.layers)
    errors = [entry.numbers[metric].stderr for entry in points]
    return Curve(
        name,
        tuple(start - entry.layers for entry in points),
        tuple(entry.numbers[metric].value for entry in points),
        stderr=tuple(error or 0.0 for error in errors) if any(errors) else None,
    )


def _member_map(group: str, members: Sequence[str], found: Sequence[Entry]) -> HeatMap | None:
    dense = dense_of(found[0].model, found) if found else None
    recovered = sorted([e for e in found if e.phase == RECOVERED], key=lambda entry: -entry.layers)
    if dense is None or not recovered:
        return None

    def change(entry: Entry, metric: str) -> float | None:
        if metric not in entry.numbers or metric not in dense.numbers:
            return None
        return entry.numbers[metric].value - dense.numbers[metric].value

    return HeatMap(
        title=group,
        x_title=REMOVED,
        y_title="",
        x=tuple(dense.layers - entry.layers for entry in recovered),
        y=tuple(name.removesuffix("/acc").removeprefix(f"{group}_").replace("_", " ") for name in members),
        values=tuple(tuple(change(entry, metric) for entry in recovered) for metric in members),
        value_title="change of accuracy",
        around_zero=True,
    )


def _groups(found: Sequence[Entry]) -> Mapping[str, list[str]]:
    """Return the metrics inside each group whose members can be told apart; `GROUPS` stand for more."""
    names = [name for name in metrics_of(found) if name.endswith("/acc")]
    headlines = [name for name in headline_metrics(found) if name.endswith("/acc")]
    groups = {}
    for headline in headlines:
        group = headline.removesuffix("/acc")
        inside = [name for name in names if name.startswith(f"{group}_")]
        known = [f"{group}_{part}/acc" for part in GROUPS.get(group, ())]
        parts = [name for name in known if name in inside] or inside
        if LEAST_MEMBERS <= len(parts) <= MOST_MEMBERS:
            groups[group] = parts
    return groups


Place = tuple[str, int]
"""Trajectory and iteration."""


def _changes(
    models: Sequence[Measured], removed: Mapping[Place, int], dropped: Mapping[Place, Sequence[int]]
) -> Figure | None:
    """Plot what each drop cost and what each recovery won back (IteRABRe, Figure 8), in the first seed."""
    first = min((model.seed for model in models), default=0)
    own = [model for model in models if model.seed == first]
    metrics = headline_metrics(own)
    chosen = metrics[:1] + [name for name in metrics[1:] if direction(name) == "higher"][:1]
    return figure(
        "changes",
        "What each drop cost and each recovery won back",
        "As Figure 8 of IteRABRe: change of the metric by pruning and by recovery"
        + (f", seed {first}" if len({m.seed for m in models}) > 1 else "")
        + "; below each pair, layers removed in all: source layers dropped in this iteration.",
        [_change(metric, own, removed, dropped) for metric in chosen],
    )


def _change(
    metric: str,
    models: Sequence[Measured],
    removed: Mapping[Place, int],
    dropped: Mapping[Place, Sequence[int]],
) -> Chart | None:
    values = {
        (m.trajectory, m.iteration, m.phase): m.numbers[metric].value for m in models if metric in m.numbers
    }
    drops: list[tuple[str, float]] = []
    gains: list[tuple[str, float]] = []
    for trajectory, iteration in sorted(dropped, key=lambda place: (removed[place], place)):

        def value(back: int, phase: str, of: str = trajectory, at: int = iteration) -> float | None:
            return values.get((of, at - back, phase))

        label = f"{removed[trajectory, iteration]}: {spans(dropped[trajectory, iteration])}"
        before = value(1, RECOVERED)
        before = value(1, DENSE) if before is None else before
        pruned, recovered = value(0, PRUNED), value(0, RECOVERED)
        if before is not None and pruned is not None:
            drops.append((label, pruned - before))
        if pruned is not None and recovered is not None:
            gains.append((label, recovered - pruned))
    curves = [
        Curve(name, tuple(label for label, _ in points), tuple(change for _, change in points))
        for name, points in (("pruning", drops), ("recovery", gains))
    ]
    if len({label for label, _ in (*drops, *gains)}) < LEAST_DEPTHS:
        return None
    return chart("", "layers removed: dropped now", "change", curves, "bars", metric)


def spans(layers: Sequence[int]) -> str:
    """Write ascending indices as text, runs of them as `3–7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], layer]
        else:
            runs.append([layer])
    return ", ".join("–".join(map(str, run)) for run in runs)


def _losses(ledger: pa.Table, removed: Mapping[Place, int]) -> Figure | None:
    seed = pc.min(ledger["seed"]).as_py()
    wanted = (pc.field("stage") == "recover") & (pc.field("metric") == "loss") & (pc.field("seed") == seed)
    steps = ledger.filter(wanted & pc.is_null(pc.field("phase")) & pc.is_valid(pc.field("step")))
    found: dict[Place, list[tuple[int, float]]] = {}
    for row in steps.select(["trajectory", "iteration", "step", "value"]).to_pylist():
        found.setdefault((row["trajectory"], row["iteration"]), []).append((row["step"], row["value"]))
    places = sorted(found, key=lambda place: removed.get(place, 0))
    every = -(-len(places) // MOST_CURVES) or 1
    curves = []
    for place in [p for i, p in enumerate(places) if (len(places) - 1 - i) % every == 0]:
        at, losses = zip(*sorted(found[place]), strict=True)
        count = removed.get(place, 0)
        curves.append(Curve(f"{count} layer{'s' if count != 1 else ''} removed", at, losses))
    several = len(pc.unique(ledger["seed"])) > 1
    note = "Training loss at each optimizer step" + (f", seed {seed}" if several else "")
    return figure(
        "recovery-loss",
        "Recovery",
        f"{note}; of long runs means of neighbours, of many iterations some.",
        [chart("loss", "optimizer step", "loss", curves)],
        sequential=True,
    )


def _score_maps(ledger: pa.Table, removed: Mapping[Place, int]) -> Figure | None:
    """Map the scores of all layers over the iterations, a panel a seed; seeds that agree have one."""
    panels: list[HeatMap] = []
    for seed in pc.unique(ledger["seed"]).to_pylist():
        panel = _score_map(ledger.filter(pc.field("seed") == seed), removed, f"seed {seed}")
        if panel and all((panel.values, panel.marked) != (p.values, p.marked) for p in panels):
            panels.append(panel)
    return figure(
        "layer-scores",
        "Layer scores",
        "Score of every layer that was still there, by its index in the unpruned model, at each scoring. "
        "A cross marks what was dropped then; empty cells were dropped before. Seeds that agree are one. "
        "Of layers that were given up early it is what the score can be at best.",
        panels[:MOST_SEEDS],
    )


def _score_map(ledger: pa.Table, removed: Mapping[Place, int], title: str) -> HeatMap | None:
    def by_place(stage: str, *metrics: str) -> dict[tuple[int, int], float]:
        rows = ledger.filter((pc.field("stage") == stage) & pc.field("metric").isin(metrics))
        return {
            (row["layer"], removed[place]): row["value"]
            for row in rows.select(["trajectory", "iteration", "layer", "value"]).to_pylist()
            if (place := (row["trajectory"], row["iteration"])) in removed
        }

    scores = by_place("score", *SCORE_METRICS.values())
    if len({depth for _, depth in scores}) < LEAST_DEPTHS:
        return None
    x, y = (tuple(sorted(set(values))) for values in zip(*scores, strict=True))
    return HeatMap(
        title=title,
        x_title="source layer",
        y_title="layers removed then",
        x=x,
        y=y,
        values=tuple(tuple(scores.get((layer, depth)) for layer in x) for depth in y),
        value_title="score",
        marked=tuple(place for place in by_place("prune", "dropped") if place in scores),
    )


def _cost(ledger: pa.Table, removed: Mapping[Place, int]) -> Figure | None:
    """Plot the seconds of each kind of stage by depth: the mean over trajectories."""
    rows = ledger.filter(pc.field("metric") == "seconds")
    seconds: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows.select(["trajectory", "iteration", "stage", "value"]).to_pylist():
        depth = removed.get((row["trajectory"], row["iteration"]), 0)
        sums = seconds.setdefault((row["stage"], depth), {})
        sums[row["trajectory"]] = sums.get(row["trajectory"], 0.0) + row["value"]
    curves = []
    for stage in STAGES:
        depths = sorted(depth for kind, depth in seconds if kind == stage)
        heights = tuple(mean(seconds[stage, depth].values()) for depth in depths)
        curves.append(Curve(stage, tuple(depths), heights) if depths else None)
    return figure(
        "cost",
        "Cost by stage",
        "Seconds of each stage when it was computed, mean over trajectories; a stage that was found in the "
        "store cost nothing again.",
        [chart("cost", REMOVED, "seconds", curves, "stacked")],
    )
