"""What the page begins with: the best model at each size, and a sentence on what each method came to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.reporting.data.accuracies import MEAN_ACCURACY
from orchestrator.reporting.data.comparisons import Entry, dense_of, mean_kept, mean_kept_above_chance
from orchestrator.reporting.data.due import Due
from orchestrator.reporting.data.measured import (
    DENSE,
    RECOVERED,
    direction,
    headline_metrics,
    is_speed,
    retention,
    within_noise,
)
from orchestrator.reporting.tables.metric_names import named
from orchestrator.reporting.tables.tables import is_perplexity, show

MOST_METRICS = 3
SPEEDUP = "throughput/speedup"

Exports = Mapping[tuple[str, int], str]
"""Where the model of a trajectory lies that has so many layers."""


@dataclass(frozen=True)
class Choice:
    """The model to take at one size, in parts of sentences.

    `facts` are (figure, what it is of), the size first. `metric` names what decides, `value` is it, and
    `rivals` are the other methods with theirs; `even` are those of them that cannot be told from the best,
    and `why` says what that rests on. `path` is where the model lies, empty if it was not exported. While
    there are methods `due`, which are not measured yet, none is chosen: `rivals` has all that are. `ended`
    never will be measured.
    """

    model: str
    size: str
    method: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    metric: str = ""
    value: str = ""
    rivals: tuple[str, ...] = ()
    even: tuple[str, ...] = ()
    why: str = ""
    path: str = ""
    due: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()

    @property
    def apart(self) -> tuple[str, ...]:
        """The other methods that are told apart from the best, with their numbers."""
        return self.rivals[len(self.even) :] if self.method else ()


def best_at_each_size(
    found: Sequence[Entry], due: Sequence[Due] = (), exports: Exports | None = None
) -> list[Choice]:
    """Choose for each source and size the method that keeps the most.

    The mean accuracy decides, without one the first headline metric, which is a perplexity if one was
    measured. Of models whose accuracy cannot be told apart, the one with the lowest perplexity is chosen. The
    sizes are those at which models were exported; before any was, all that are measured. As
    long as a method is due there, none is chosen.
    """
    exports = exports or {}
    choices = []
    for model in dict.fromkeys(entry.model for entry in found):
        own = [entry for entry in found if entry.model == model]
        dense = dense_of(model, own)
        recovered = [entry for entry in own if entry.phase == RECOVERED]
        missing = [one for one in due if one.model == model]
        depths = {entry.layers for entry in recovered}
        depths |= {one.layers for one in missing if one.reached and not one.ended}
        names = {trajectory for entry in recovered for trajectory in entry.trajectories}
        exported = {layers for trajectory, layers in exports if trajectory in names}
        for depth in sorted(depths & exported or depths, reverse=True):
            rivals = [entry for entry in recovered if entry.layers == depth]
            missing_here = [one for one in missing if one.layers == depth]
            choices.append(_at_depth(model, depth, rivals, dense, missing_here, exports))
    return [choice for choice in choices if choice is not None]


def _at_depth(
    model: str,
    depth: int,
    rivals: Sequence[Entry],
    dense: Entry | None,
    missing: Sequence[Due],
    exports: Exports,
) -> Choice | None:
    metrics = headline_metrics(rivals)
    decides = MEAN_ACCURACY if MEAN_ACCURACY in metrics else metrics[0] if metrics else ""
    measured = [entry for entry in rivals if decides in entry.numbers]
    late = {one.method: f"{one.method} is not measured yet" for one in missing if not one.ended}
    for entry in rivals:
        if entry.method in late:
            late[entry.method] = f"{entry.method} is not measured yet with all seeds"
        elif entry not in measured:
            late[entry.method] = f"{entry.method} is not measured yet by {named(decides)}"
    if not measured and not late:
        return None
    ended = tuple(dict.fromkeys(one.method for one in missing if one.ended))
    size = f"{depth} layers" if dense is None else f"{depth} of {dense.layers} layers"
    metric = named(decides) if measured else ""
    ranked = sorted(measured, key=lambda e: e.numbers[decides].value, reverse=direction(decides) == "higher")
    if late:
        named_all = tuple(_with_number(entry, decides) for entry in ranked)
        return Choice(model, size, metric=metric, rivals=named_all, due=tuple(late.values()), ended=ended)
    first, *others = ranked
    level = [first, *(one for one in others if within_noise(first.numbers[decides], one.numbers[decides]))]
    best, why = first, _why(first, level[1:], decides)
    tie = next(filter(is_perplexity, metrics), None) if decides == MEAN_ACCURACY else None
    if len(level) > 1 and tie and all(tie in one.numbers for one in level):
        best = min(level, key=lambda one: one.numbers[tie].value)
        why += f"; of these it has the lowest {named(tie)}"
    even = [one for one in level if one is not best]
    places = [exports[place] for name in best.trajectories if (place := (name, depth)) in exports]
    return Choice(
        model,
        size,
        best.method,
        tuple(_facts(best, dense)),
        metric,
        show(best.numbers[decides]),
        tuple(_with_number(one, decides) for one in (*even, *(one for one in ranked if one not in level))),
        tuple(one.method for one in even),
        why,
        places[0] if places else "",
        ended=ended,
    )


def _with_number(entry: Entry, metric: str) -> str:
    return f"{entry.method} ({show(entry.numbers[metric])})"


def _why(best: Entry, even: Sequence[Entry], metric: str) -> str:
    """Say what the order of the best and the others rests on."""
    if even and (best.numbers[metric].stderr is None or any(e.numbers[metric].stderr is None for e in even)):
        return f"one seed, and less than 2 % between them in {named(metric)}"
    if even:
        return f"within two standard errors of their difference in {named(metric)}"
    seeds = f"{best.seeds} seeds" if best.seeds > 1 else "one seed"
    if best.numbers[metric].stderr is None:
        return f"{seeds}, without an error"
    return f"± is one standard error, {seeds}"


def _facts(entry: Entry, dense: Entry | None) -> list[tuple[str, str]]:
    """Return size, speed and quality as (figure, what it is of)."""
    facts = []
    if entry.parameters:
        fewer = f", {1 - entry.parameters / dense.parameters:.0%} fewer" if dense and dense.parameters else ""
        facts.append((format_count(entry.parameters), f"parameters{fewer}"))
    if speedup := entry.numbers.get(SPEEDUP):
        facts.append((f"{speedup.value:.2f} ×", "the decoding speed"))
    average = mean_kept(entry, dense)
    if dense and average:
        above = mean_kept_above_chance(entry, dense)
        rest = f" ({above.value:.0f} % of what is above chance)" if above else ""
        share = _percent(average.value, average.stderr)
        facts.append((f"{share} kept", f"of the mean accuracy on {len(dense.averaged)} tasks{rest}"))
    quality = [name for name in headline_metrics([entry]) if not is_speed(name) and name != MEAN_ACCURACY]
    return facts + [_against(entry, dense, name) for name in quality[: 1 if average else 2]]


def _percent(value: float, stderr: float | None) -> str:
    return f"{value:.0f} %" if stderr is None or stderr < 0.5 else f"{value:.0f} ± {stderr:.0f} %"


def _against(entry: Entry, dense: Entry | None, metric: str) -> tuple[str, str]:
    """Return a metric as its factor to the unpruned model's, or the share that is left of a score."""
    number = entry.numbers[metric]
    if dense is None or metric not in dense.numbers:
        return show(number), named(metric)
    before = dense.numbers[metric].value
    text = f"{named(metric)}, {show(before)} → {show(number)}"
    if not before:  # a share of nothing means nothing
        return show(number), f"{named(metric)}, unpruned {show(before)}"
    if direction(metric) == "lower":
        return f"{number.value / before:.2f} ×", f"the {text}"
    return f"{100 * retention(number.value, before, metric):.0f} % kept", f"of {text}"


def format_count(parameters: int) -> str:
    """Write a number of parameters, of many with its unit: 84,192, 134.5 M, 8.03 B."""
    if parameters < 1e6:
        return f"{parameters:,}"
    return f"{parameters / 1e9:,.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:,.4g} M"


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
            parts.append(
                f"{named(metric)} {show(first.numbers[metric].value)} → {show(last.numbers[metric])}"
            )
    return "; ".join(parts) + "."
