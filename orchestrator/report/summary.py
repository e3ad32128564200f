"""Sentences written from the numbers: which model to take at each size, and what each method came to."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.report.comparisons import Entry, dense_of
from orchestrator.report.measured import (
    DENSE,
    RECOVERED,
    Number,
    direction,
    headline_metrics,
    retention,
    within_noise,
)
from orchestrator.report.tables import is_perplexity, show, show_error

MOST_METRICS = 3


@dataclass(frozen=True)
class Choice:
    """The method to take at one size, in parts of a sentence.

    `metric` is the one that decides. `even` are the other methods that cannot be told from the best, with
    their numbers; where there are none, `rival` is the next best, empty if there is no other. `error` says
    what stands behind ±, or why nothing does.
    """

    model: str
    size: str
    method: str
    metric: str
    numbers: tuple[str, ...]
    error: str
    rival: str = ""
    even: tuple[str, ...] = ()


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
    )


def _named(entry: Entry, metric: str) -> str:
    return f"{entry.method} ({with_error(entry.numbers[metric])})"


def _kind_of_error(entry: Entry, shown: Sequence[str]) -> str:
    """Which standard error the numbers of a sentence have; the first of them decides."""
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
    """The value ± its standard error, where it has one."""
    return show(number.value) + ("" if number.stderr is None else f" ± {show_error(number.stderr)}")


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
    """`metric 32.5 ± 0.4 (unpruned 23.24, ×1.40)`, or the share that is left of a score."""
    value, told = entry.numbers[metric].value, f"{metric} {with_error(entry.numbers[metric])}"
    if dense is None or metric not in dense.numbers:
        return told
    before = dense.numbers[metric].value
    if direction(metric) == "lower":
        return f"{told} (unpruned {show(before)}, ×{value / before:.2f})"
    return f"{told} (unpruned {show(before)}, {retention(value, before, metric):.0%} kept)"


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
            parts.append(f"{metric} {show(first.numbers[metric].value)} → {with_error(last.numbers[metric])}")
    return "; ".join(parts) + "."
