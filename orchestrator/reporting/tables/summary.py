"""Sentences written from the numbers: which model to take at each size, and what each method came to."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.reporting.data.comparisons import Entry, dense_of
from orchestrator.reporting.data.due import Due
from orchestrator.reporting.data.measured import (
    DENSE,
    RECOVERED,
    Number,
    direction,
    headline_metrics,
    retention,
    within_noise,
)
from orchestrator.reporting.tables.tables import is_perplexity, show, show_error

MOST_METRICS = 3


@dataclass(frozen=True)
class Choice:
    """The method to take at one size, in parts of a sentence.

    `metric` is the one that decides. `even` are the other methods that cannot be distinguished from the
    best, with their numbers; where there are none, `rival` is the next best, empty if there is no other.
    `error` says what stands behind ±, or why nothing does. While there are methods `due`, which are not
    measured yet, none is to be taken: `measured` has those that are, with their numbers. `ended` never
    will be measured.
    """

    model: str
    size: str
    method: str = ""
    metric: str = ""
    numbers: tuple[str, ...] = ()
    error: str = ""
    rival: str = ""
    even: tuple[str, ...] = ()
    due: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()


def best_at_each_size(found: Sequence[Entry], due: Sequence[Due] = ()) -> list[Choice]:
    """Choose for each source and depth the method that keeps the most, and compare it with the others.

    The first headline metric decides: a perplexity, if one was measured. Depths that a method has reached
    are named even while nothing is measured there; as long as a method is due, none is chosen.
    """
    choices = []
    for model in dict.fromkeys(entry.model for entry in found):
        own = [entry for entry in found if entry.model == model]
        dense = dense_of(model, own)
        recovered = [entry for entry in own if entry.phase == RECOVERED]
        missing = [one for one in due if one.model == model]
        depths = {entry.layers for entry in recovered}
        depths |= {one.layers for one in missing if one.reached and not one.ended}
        for depth in sorted(depths, reverse=True):
            rivals = [entry for entry in recovered if entry.layers == depth]
            missing_here = [one for one in missing if one.layers == depth]
            choices.append(_at_depth(model, depth, rivals, dense, missing_here))
    return [choice for choice in choices if choice is not None]


def _at_depth(
    model: str, depth: int, rivals: Sequence[Entry], dense: Entry | None, missing: Sequence[Due]
) -> Choice | None:
    metrics = headline_metrics(rivals)
    measured = [entry for entry in rivals if metrics and metrics[0] in entry.numbers]
    late = {one.method: f"{one.method} is not measured yet" for one in missing if not one.ended}
    for entry in rivals:
        if entry.method in late:
            late[entry.method] = f"{entry.method} is not measured yet with all seeds"
        elif metrics and entry not in measured:
            late[entry.method] = f"{entry.method} is not measured yet by {metrics[0]}"
    ended = tuple(dict.fromkeys(one.method for one in missing if one.ended))
    if not measured and not late:
        return None
    size = _size(measured[0], dense) if measured else _depth(depth, dense)
    if late:
        named = tuple(_named(entry, metrics[0]) for entry in measured)
        metric = metrics[0] if measured else ""
        return Choice(model, size, metric=metric, due=tuple(late.values()), measured=named, ended=ended)
    decides, highest_first = metrics[0], direction(metrics[0]) == "higher"
    best, *others = sorted(measured, key=lambda e: e.numbers[decides].value, reverse=highest_first)
    even = [one for one in others if within_noise(best.numbers[decides], one.numbers[decides])]
    shown = [name for name in metrics[:MOST_METRICS] if name in best.numbers]
    return Choice(
        best.model,
        _size(best, dense),
        best.method,
        decides,
        tuple(_against(best, dense, name) for name in shown),
        _kind_of_error(best, shown),
        _named(others[0], decides) if others and not even else "",
        tuple(_named(one, decides) for one in even),
        ended=ended,
    )


def _named(entry: Entry, metric: str) -> str:
    return f"{entry.method} ({with_error(entry.numbers[metric])})"


def _kind_of_error(entry: Entry, shown: Sequence[str]) -> str:
    """Name the standard error that the numbers of a sentence have; the first of them decides."""
    if entry.seeds > 1:
        of_tasks = any(not is_perplexity(name) for name in shown)
        own = ", with that of a task's questions" if of_tasks else ""
        return f"± is the standard error over {entry.seeds} seeds{own}"
    known = [entry.numbers[name].stderr is not None for name in shown]
    parts = ["± is the standard error of a task's questions"] if any(known) else []
    if not known[0]:
        parts.append(f"one seed does not tell the error of {shown[0]}")
    return "; ".join(parts)


def with_error(number: Number) -> str:
    """Write the value ± its standard error, where it has one."""
    return show(number.value) + ("" if number.stderr is None else f" ± {show_error(number.stderr)}")


def _depth(layers: int, dense: Entry | None) -> str:
    return f"{layers} layers" if dense is None else f"{layers} of {dense.layers} layers"


def _size(entry: Entry, dense: Entry | None) -> str:
    size = _depth(entry.layers, dense)
    if dense and entry.parameters and dense.parameters:
        fewer = 1 - entry.parameters / dense.parameters
        size += f" ({format_count(entry.parameters)} parameters, {fewer:.0%} fewer)"
    return size


def format_count(parameters: int) -> str:
    """Write a number of parameters, of many with its unit: 84,192, 134.5 M, 8.03 B."""
    if parameters < 1e6:
        return f"{parameters:,}"
    return f"{parameters / 1e9:,.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:,.4g} M"


def _against(entry: Entry, dense: Entry | None, metric: str) -> str:
    """Write `metric 32.5 ± 0.4 (unpruned 23.24, ×1.40)`, or the share that is left of a score."""
    value, measured = entry.numbers[metric].value, f"{metric} {with_error(entry.numbers[metric])}"
    if dense is None or metric not in dense.numbers:
        return measured
    before = dense.numbers[metric].value
    if not before:  # a share of nothing means nothing
        return f"{measured} (unpruned {show(before)})"
    if direction(metric) == "lower":
        return f"{measured} (unpruned {show(before)}, ×{value / before:.2f})"
    return f"{measured} (unpruned {show(before)}, {retention(value, before, metric):.0%} kept)"


def of_method(found: Sequence[Entry]) -> str:
    """Describe one method on one source in a sentence, from the unpruned to the smallest measured model."""
    done = sorted([e for e in found if e.phase in (DENSE, RECOVERED)], key=lambda entry: -entry.layers)
    last = done[-1] if done else None
    if last is None or last.phase == DENSE:
        return "Only the unpruned model has been measured so far."
    first = done[0]
    parts = []
    if first.layers and last.layers:
        parts.append(f"{first.layers} → {last.layers} layers ({1 - last.layers / first.layers:.0%} removed)")
    if first.parameters and last.parameters:
        parts.append(f"{format_count(first.parameters)} → {format_count(last.parameters)} parameters")
    for metric in headline_metrics([first, last])[:MOST_METRICS]:
        if metric in first.numbers.keys() & last.numbers:
            parts.append(f"{metric} {show(first.numbers[metric].value)} → {with_error(last.numbers[metric])}")
    return "; ".join(parts) + "."
