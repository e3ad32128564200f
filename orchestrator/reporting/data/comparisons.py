"""The tables of the papers, from a campaign's own numbers: methods at a target, direct against iterative,
languages, and what is retained of the unpruned model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import hypot
from statistics import mean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.reporting.data.accuracies import (
    ABOVE_CHANCE,
    KEPT,
    MEAN_ACCURACY,
    accuracy_tasks,
    chance_of,
    kept,
)
from orchestrator.reporting.data.measured import (
    DENSE,
    PRUNED,
    RECOVERED,
    Measured,
    Number,
    direction,
    headline_metrics,
    is_speed,
    retention,
    stderr_of_difference,
    within_noise,
)
from orchestrator.reporting.tables.tables import Cell, Line, show

LANGUAGE_TASKS = ("xwinograd", "xstorycloze", "xnli", "xcopa")
NOT_PRUNED = "unpruned"
DIFFERENCE = "difference"
LABELS = ("model", "method", "layers", "removed", "parameters", "state", "seeds")
"""Columns that say what a row is; all others are measured."""


@dataclass(frozen=True)
class Grid:
    """A table of the report.

    `best` holds (row, column) of the best values within each group of rows, `even`
    those which cannot be told from them, or differences that cannot be told from 0. `bars` holds the
    share of the unpruned model's value, 1 for all of it, of the cells that have a bar.
    """

    name: str
    title: str
    note: str
    lines: tuple[Line, ...]
    best: frozenset[Cell] = frozenset()
    even: frozenset[Cell] = frozenset()
    bars: Mapping[Cell, float] = field(default_factory=dict)

    def shown(self, lines: Sequence[tuple[int, Line]]) -> list[str]:
        """Return the columns that hold anything, without the source model, which a part on the page names."""
        names = [name for name in (self.lines[0] if self.lines else ()) if name != "model"]
        return [name for name in names if any(line[name] is not None for _, line in lines)]

    @property
    def parts(self) -> list[tuple[str, list[tuple[int, Line]]]]:
        """Source model, and its lines with their number in the whole table."""
        found: dict[str, list[tuple[int, Line]]] = {}
        for row, line in enumerate(self.lines):
            found.setdefault(line.get("model", ""), []).append((row, line))
        return list(found.items())


@dataclass(frozen=True)
class Entry:
    """A method's model at one depth and in one state, over all its seeds; `trajectories` has one of each."""

    model: str
    method: str
    phase: str
    layers: int
    parameters: int | None
    seeds: int
    numbers: Mapping[str, Number]
    trajectories: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()  # as in `Measured`


def dense_of(model: str, found: Iterable[Entry]) -> Entry | None:
    """Return the unpruned model of that source, if it has been measured."""
    return next((entry for entry in found if (entry.model, entry.phase) == (model, DENSE)), None)


def targets(ledger: pa.Table) -> set[tuple[str, int]]:
    """Return (trajectory, iteration) of every exported model."""
    rows = ledger.filter(pc.field("stage") == "export").select(["trajectory", "iteration"]).to_pylist()
    return {(row["trajectory"], row["iteration"]) for row in rows}


def entries(models: Iterable[Measured]) -> list[Entry]:
    """Join the seeds of one method at one depth and in one state into one entry.

    Its numbers are means over seeds, with a standard error. That of one seed is of the questions asked;
    the mean's has the spread over seeds added:
    sqrt(mean of the squared errors + deviation² / seeds), as all seeds answer the same questions.
    """
    groups: dict[tuple[str, str, str, int], list[Measured]] = {}
    for each in models:
        if each.layers is not None:
            method = NOT_PRUNED if each.phase == DENSE else each.method
            groups.setdefault((each.model, method, each.phase, each.layers), []).append(each)
    joined: list[Entry] = []
    for (model, method, phase, layers), group in groups.items():
        seeds = group
        if phase == DENSE:
            # The unpruned model is the same whatever the method and seed; runs may measure more of it.
            measured = {name: number for each in reversed(group) for name, number in each.numbers.items()}
            seeds = [replace(group[0], numbers=measured)]
        names = [name for name in seeds[0].numbers if all(name in each.numbers for each in seeds)]
        numbers = {name: _over_seeds([each.numbers[name] for each in seeds]) for name in names}
        num_seeds = len({each.seed for each in seeds})
        own = tuple(each.trajectory for each in sorted(seeds, key=lambda each: each.seed))
        size, averaged = seeds[0].parameters, seeds[0].averaged
        joined.append(Entry(model, method, phase, layers, size, num_seeds, numbers, own, averaged))
    return joined


def _over_seeds(numbers: Sequence[Number]) -> Number:
    if len(numbers) == 1:
        return numbers[0]
    values = [number.value for number in numbers]
    of_questions = mean((number.stderr or 0.0) ** 2 for number in numbers) ** 0.5
    stderr = hypot(of_questions, stdev(values) / len(values) ** 0.5)
    return Number(mean(values), stderr, numbers[0].key)


def comparison_grids(ledger: pa.Table, models: Sequence[Measured], config: Mapping[str, Any]) -> list[Grid]:
    """Return all tables for which the campaign has numbers, the main one first."""
    reached = targets(ledger)
    at_targets = [m for m in models if m.phase == DENSE or (m.trajectory, m.iteration) in reached]
    found = entries(at_targets)
    grids = [
        method_grid(found),
        retention_grid(found),
        ratio_grid(found),
        schedule_grid(entries(models), config.get("methods") or []),
        language_grid(found),
    ]
    return [grid for grid in grids if grid is not None]


def method_grid(found: Sequence[Entry]) -> Grid | None:
    """Tabulate size, speed and quality of every method at each target (IteRABRe, Table 1)."""
    rows = [entry for entry in found if entry.phase in (DENSE, RECOVERED)]
    metrics = headline_metrics(rows)
    if not metrics or all(entry.phase == DENSE for entry in rows):
        return None
    # Speed and the one number of quality first, then what it is made of.
    metrics.sort(key=lambda name: (not is_speed(name), name != MEAN_ACCURACY))
    rows = _sorted(rows)
    lines = []
    for entry in rows:
        line = _labels(entry)
        for name in metrics:
            line[name] = entry.numbers.get(name)
            if name == MEAN_ACCURACY:
                line[KEPT] = mean_kept(entry, dense_of(entry.model, found))
        lines.append(line)
    lines = _same_columns(lines)
    return Grid(
        "methods",
        "Methods at their targets",
        "Bold: best of the pruned models of a source at one depth; ≈: not to be told from the best. A bar is "
        "the share of the unpruned model's value; of a perplexity, of its inverse.",
        tuple(lines),
        *_best(lines, [*metrics, KEPT], ("model", "layers")),
        _bars(rows, lines, found),
    )


def mean_kept(entry: Entry, dense: Entry | None) -> Number | None:
    """Return the per cent of the unpruned model's mean accuracy that is left."""
    if dense is None or not {MEAN_ACCURACY} <= entry.numbers.keys() & dense.numbers:
        return None
    return kept(entry.numbers[MEAN_ACCURACY], dense.numbers[MEAN_ACCURACY])


def mean_kept_above_chance(entry: Entry, dense: Entry | None) -> Number | None:
    """Return the same of what of it is above a blind guess; None if that is not known of a task."""
    if dense is None or not {MEAN_ACCURACY} <= entry.numbers.keys() & dense.numbers:
        return None
    chance = chance_of(dense.averaged)
    if chance is None:
        return None
    return kept(entry.numbers[MEAN_ACCURACY], dense.numbers[MEAN_ACCURACY], chance)


def _bars(rows: Sequence[Entry], lines: Sequence[Line], found: Sequence[Entry]) -> dict[Cell, float]:
    bars: dict[Cell, float] = {}
    for row, (entry, line) in enumerate(zip(rows, lines, strict=True)):
        dense = dense_of(entry.model, found)
        if dense is None:
            continue
        sizes = {"layers": (entry.layers, dense.layers), "parameters": (entry.parameters, dense.parameters)}
        bars |= {(row, name): own / whole for name, (own, whole) in sizes.items() if own and whole}
        for name in (column for column in line if column in dense.numbers and not is_speed(column)):
            if name in entry.numbers and dense.numbers[name].value > 0:
                share = retention(entry.numbers[name].value, dense.numbers[name].value, name)
                bars |= {(row, name): share} if share >= 0 else {}
    return bars


def retention_grid(found: Sequence[Entry]) -> Grid | None:
    """Tabulate the share of the unpruned accuracies that is left, in per cent (*Limits*, Table 2)."""
    lines = []
    for entry in _sorted([e for e in found if e.phase == RECOVERED]):
        dense = dense_of(entry.model, found)
        average = mean_kept(entry, dense)
        if dense is None or average is None:
            continue
        of_tasks = {
            name: kept(entry.numbers[name], dense.numbers[name])
            for name in accuracy_tasks([dense])
            if name in entry.numbers
        }
        lines.append(
            _labels(entry) | {KEPT: average, ABOVE_CHANCE: mean_kept_above_chance(entry, dense)} | of_tasks
        )
    lines = _same_columns(lines)
    if not lines:
        return None
    return Grid(
        "retention",
        "Accuracy kept",
        "As Table 2 of On the Limits of Layer Pruning: per cent of the unpruned model's accuracy that is "
        "left, first of the plain mean over tasks. Of what is above chance, a blind guess keeps nothing.",
        tuple(lines),
        *_best(lines, [name for name in lines[0] if name not in LABELS], ("model", "layers"), lower=False),
    )


def ratio_grid(found: Sequence[Entry]) -> Grid | None:
    """Tabulate the mean accuracy kept by method and share of layers removed (*Limits*, moderate ratios)."""
    cells: dict[tuple[str, str], dict[str, Number]] = {}
    for entry in _sorted([e for e in found if e.phase == RECOVERED]):
        dense = dense_of(entry.model, found)
        average = mean_kept(entry, dense)
        if dense and average:
            column = f"{1 - entry.layers / dense.layers:.0%} removed"
            cells.setdefault((entry.model, entry.method), {})[column] = average
    columns = sorted(
        {column for row in cells.values() for column in row}, key=lambda text: int(text.split("%")[0])
    )
    if len(columns) < 2:
        return None
    lines = [
        {"model": model, "method": method} | {column: row.get(column) for column in columns}
        for (model, method), row in cells.items()
    ]
    return Grid(
        "ratios",
        "Accuracy kept by share removed",
        "Per cent of the unpruned model's mean accuracy that is left.",
        tuple(lines),
        *_best(lines, columns, ("model",), lower=False),
    )


def schedule_grid(found: Sequence[Entry], methods: Sequence[Mapping[str, Any]]) -> Grid | None:
    """Compare direct with iterative where two methods differ in nothing else (IteRABRe, Table 2)."""
    lines: list[Line] = []
    for direct, iterative in schedule_pairs(methods):
        for one in _sorted([e for e in found if (e.method, e.phase) == (direct, RECOVERED)]):
            other = next(
                (e for e in found if (e.model, e.method, e.phase, e.layers)
                 == (one.model, iterative, RECOVERED, one.layers)),
                None,
            )  # fmt: skip
            lines += _pair_lines(one, other) if other else []
    lines = _same_columns(lines)
    if not lines:
        return None
    return Grid(
        "schedules",
        "Direct against iterative",
        "As Table 2 of IteRABRe: a positive difference means that iterative is better, ≈ that the two "
        "are not told apart.",
        tuple(lines),
        even=frozenset(
            (row, name)
            for row, line in enumerate(lines)
            for name, value in line.items()
            if line["method"] == DIFFERENCE and isinstance(value, Number)
            # The two lines above have what is compared.
            if within_noise(lines[row - 2][name], lines[row - 1][name])
        ),
    )


def schedule_pairs(methods: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return names of (direct, iterative) methods that have all settings but the schedule in common."""

    def settings(method: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in method.items() if name not in ("name", "schedule")}

    def is_direct(method: Mapping[str, Any]) -> bool:
        return (method.get("schedule") or {}).get("mode") == "direct"

    return [
        (one["name"], other["name"])
        for one in methods
        for other in methods
        if is_direct(one) and not is_direct(other) and settings(one) == settings(other)
    ]


def _pair_lines(direct: Entry, iterative: Entry) -> list[Line]:
    metrics = [
        name
        for name in headline_metrics([direct, iterative])
        if name in direct.numbers.keys() & iterative.numbers
    ]
    gain = {}
    for name in metrics:
        one, other = direct.numbers[name], iterative.numbers[name]
        better = one.value - other.value if direction(name) == "lower" else other.value - one.value
        gain[name] = Number(better, stderr_of_difference(one, other), "")
    return [
        *(_labels(entry) | {name: entry.numbers[name] for name in metrics} for entry in (direct, iterative)),
        _labels(iterative) | {"method": DIFFERENCE} | gain,
    ]


def language_grid(found: Sequence[Entry]) -> Grid | None:
    """Tabulate multilingual tasks, pruned (P) and recovered (P+R) (IteRABRe, Table 3)."""
    metrics = [
        name
        for name in headline_metrics(found)
        if name.split("/")[0].removesuffix("_local") in LANGUAGE_TASKS and "acc" in name
    ]
    if not metrics:
        return None
    state = {DENSE: NOT_PRUNED, PRUNED: "P", RECOVERED: "P+R"}
    lines = [
        _labels(entry) | {"state": state[entry.phase]} | {name: entry.numbers.get(name) for name in metrics}
        for entry in _sorted(found)
    ]
    return Grid(
        "languages",
        "Languages",
        "As Table 3 of IteRABRe: P is pruned, P+R recovered.",
        tuple(_same_columns(lines)),
        *_best(lines, metrics, ("model", "layers")),
    )


def _labels(entry: Entry) -> Line:
    labels: Line = {
        "model": entry.model,
        "method": entry.method,
        "layers": entry.layers,
        "parameters": entry.parameters,
    }
    return labels | ({"seeds": entry.seeds} if entry.seeds > 1 else {})


def _sorted(found: Iterable[Entry]) -> list[Entry]:
    """Sort from the deepest to the shallowest of each model; models and methods keep their own order."""
    found = list(found)
    rank = {model: place for place, model in enumerate(dict.fromkeys(entry.model for entry in found))}
    return sorted(found, key=lambda entry: (rank[entry.model], -entry.layers))


def _same_columns(lines: Sequence[Line]) -> list[Line]:
    names = dict.fromkeys(name for line in lines for name in line)
    ordered = [*(name for name in LABELS if name in names), *(name for name in names if name not in LABELS)]
    return [{name: line.get(name) for name in ordered} for line in lines]


def _best(
    lines: Sequence[Line], metrics: Sequence[str], group: Sequence[str], lower: bool | None = None
) -> tuple[frozenset[Cell], frozenset[Cell]]:
    """Return cells that no other of their group beats as shown, and those within noise of them."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, line in enumerate(lines):
        if line.get("method") != NOT_PRUNED:
            groups.setdefault(tuple(line[name] for name in group), []).append(index)
    best: set[Cell] = set()
    even: set[Cell] = set()
    for rows in groups.values():
        for metric in metrics:
            numbers = {index: lines[index][metric] for index in rows if lines[index].get(metric) is not None}
            # Cells that look alike are alike: all of them are best, and where there are no others, none.
            if len({show(number.value) for number in numbers.values()}) < 2:
                continue
            descends = direction(metric) == "lower" if lower is None else lower
            top = (min if descends else max)(numbers.values(), key=lambda number: number.value)
            best |= {(i, metric) for i, number in numbers.items() if show(number.value) == show(top.value)}
            even |= {(i, metric) for i, number in numbers.items() if within_noise(number, top)}
    return frozenset(best), frozenset(even - best)
