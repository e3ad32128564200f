"""Sentences written from the numbers: which model to take at each size, and what each method came to."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.report.comparisons import Entry, dense_of
from orchestrator.report.measured import (
    DENSE,
    RECOVERED,
    direction,
    headline_metrics,
    retention,
    within_noise,
)
from orchestrator.report.tables import show

MOST_METRICS = 3


@dataclass(frozen=True)
class Choice:
    """The method to take at one size, in parts of a sentence.

    `metric` is the one that decides. `rival` is the next best, `even` whether it is within noise; empty and
    False where there is none.
    """

    model: str
    size: str
    method: str
    metric: str
    numbers: tuple[str, ...]
    rival: str
    even: bool


def best_at_each_size(found: Sequence[Entry]) -> list[Choice]:
    """For each source and depth, the method that keeps the most and how it compares.

    The first headline metric decides: a perplexity, if one was measured.
    """
    choices = []
    for model in dict.fromkeys(entry.model for entry in found):
        own = [entry for entry in found if entry.model == model]
        dense = dense_of(model, own)
        recovered = [entry for entry in own if entry.phase == RECOVERED]
        for depth in sorted({entry.layers for entry in recovered}, reverse=True):
            choices.append(_at_depth([entry for entry in recovered if entry.layers == depth], dense))
    return [choice for choice in choices if choice is not None]


def _at_depth(rivals: Sequence[Entry], dense: Entry | None) -> Choice | None:
    metrics = headline_metrics(rivals)
    measured = [entry for entry in rivals if metrics and metrics[0] in entry.numbers]
    if not measured:
        return None
    highest_first = direction(metrics[0]) == "higher"
    best, *others = sorted(measured, key=lambda e: e.numbers[metrics[0]].value, reverse=highest_first)
    numbers = [_against(best, dense, name) for name in metrics[:MOST_METRICS] if name in best.numbers]
    rival, even = "", False
    if others:
        theirs = others[0].numbers[metrics[0]]
        rival, even = f"{others[0].method}, {show(theirs)}", within_noise(best.numbers[metrics[0]], theirs)
    return Choice(best.model, _size(best, dense), best.method, metrics[0], tuple(numbers), rival, even)


def _size(entry: Entry, dense: Entry | None) -> str:
    if dense is None:
        return f"{entry.layers} layers"
    size = f"{entry.layers} of {dense.layers} layers"
    if entry.parameters and dense.parameters:
        fewer = 1 - entry.parameters / dense.parameters
        size += f" ({counted(entry.parameters)} parameters, {fewer:.0%} fewer)"
    return size


def counted(parameters: int) -> str:
    """A number of parameters, of many with its unit: 84,192, 134.5 M, 8.03 B."""
    if parameters < 1e6:
        return f"{parameters:,}"
    return f"{parameters / 1e9:,.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:,.4g} M"


def _against(entry: Entry, dense: Entry | None, metric: str) -> str:
    """`metric 32.5 (×1.40 of the unpruned)`, or the share that is left of a score."""
    number = entry.numbers[metric]
    value = number.value
    if dense is None or metric not in dense.numbers:
        return f"{metric} {show(number)}"
    before = dense.numbers[metric].value
    if direction(metric) == "lower":
        return f"{metric} {show(number)} (unpruned {show(before)}, ×{value / before:.2f})"
    return f"{metric} {show(number)} (unpruned {show(before)}, {retention(value, before, metric):.0%} kept)"


def of_method(found: Sequence[Entry]) -> str:
    """One method on one source in a sentence, from the unpruned to the smallest measured model."""
    done = sorted([e for e in found if e.phase in (DENSE, RECOVERED)], key=lambda entry: -entry.layers)
    last = done[-1] if done else None
    if last is None or last.phase == DENSE:
        return "Only the unpruned model has been measured so far."
    first = done[0]
    parts = []
    if first.layers and last.layers:
        parts.append(f"{first.layers} → {last.layers} layers ({1 - last.layers / first.layers:.0%} removed)")
    if first.parameters and last.parameters:
        parts.append(f"{counted(first.parameters)} → {counted(last.parameters)} parameters")
    for metric in headline_metrics([first, last])[:MOST_METRICS]:
        if metric in first.numbers.keys() & last.numbers:
            parts.append(f"{metric} {show(first.numbers[metric].value)} → {show(last.numbers[metric])}")
    return "; ".join(parts) + "."
