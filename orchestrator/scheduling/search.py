"""Which trajectories of a search are given up, decided from what the ledger holds of them.

The rules are those of asynchronous successive halving (Li et al. 2020, "A System for Massively Parallel
Hyperparameter Tuning") and of median stopping (Golovin et al. 2017, "Google Vizier"). A decision looks only
at what was measured before it, so that it comes out the same when a run is resumed.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean, median

from orchestrator.config import SearchConfig

MEDIAN_OF = 3
"""Median stopping decides nothing with fewer other trajectories."""


@dataclass(frozen=True)
class Measured:
    """The value of the search's metric that a trajectory had at the end of an iteration."""

    trajectory: str
    iteration: int
    value: float
    when: datetime


def measured_of(rows: Iterable[Mapping[str, object]], metric: str) -> list[Measured]:
    """Return the values of `metric` among rows of a ledger: those of recovered models."""
    return [
        Measured(row["trajectory"], row["iteration"], row["value"], row["when"])  # type: ignore[arg-type]
        for row in rows
        if (row["stage"], row["phase"], row["metric"]) == ("evaluate", "recovered", metric)
    ]


def why_given_up(
    search: SearchConfig, measured: Collection[Measured], trajectory: str, iteration: int
) -> str | None:
    """Return why the trajectory ends after that iteration, in words for the user; None if it goes on.

    One that was measured at a later iteration has been let on before, and goes on.
    """
    own = {each.iteration: each for each in measured if each.trajectory == trajectory}
    if search.scheduler == "none" or iteration not in own or max(own) > iteration:
        return None
    now = own[iteration]
    before = [
        each
        for each in measured
        if each.trajectory != trajectory and (each.when, each.trajectory) < (now.when, trajectory)
    ]
    rule = _halving if search.scheduler == "asha" else _median
    return rule(search, before, [own[i] for i in sorted(own)])


def _halving(search: SearchConfig, before: Sequence[Measured], own: Sequence[Measured]) -> str | None:
    """Compare a trajectory that has come to a rung with those that were there before it."""
    now, came_from = own[-1].iteration, own[-2].iteration if len(own) > 1 else 0
    rung = search.grace_iterations
    while rung * search.reduction_factor <= now:
        rung *= search.reduction_factor
    if not came_from < rung <= now:
        return None
    # Where not every iteration is measured, the first one at the rung or beyond it stands for the rung.
    there: dict[str, Measured] = {}
    for each in sorted(before, key=lambda each: each.iteration):
        if each.iteration >= rung:
            there.setdefault(each.trajectory, each)
    if not there:
        return None
    losses = sorted(_loss(search, each.value) for each in there.values())
    cutoff = _quantile(losses, 1 / search.reduction_factor)
    if _loss(search, own[-1].value) <= cutoff:
        return None
    return (
        f"{search.metric} {own[-1].value:.6g} after iteration {now} is not among the best "
        f"1/{search.reduction_factor} of the {len(there)} trajectories that came there before"
    )


def _median(search: SearchConfig, before: Sequence[Measured], own: Sequence[Measured]) -> str | None:
    """Compare the best value of a trajectory with the median of the others' means."""
    now = own[-1].iteration
    if now < search.grace_iterations:
        return None
    losses: dict[str, list[float]] = {}
    for each in before:
        if each.iteration <= now:
            losses.setdefault(each.trajectory, []).append(_loss(search, each.value))
    if len(losses) < MEDIAN_OF:
        return None
    middle = median(fmean(values) for values in losses.values())
    if min(_loss(search, each.value) for each in own) <= middle:
        return None
    shown = middle if search.mode == "min" else -middle
    return (
        f"{search.metric} {own[-1].value:.6g} after iteration {now}, and all before, are worse than "
        f"{shown:.6g}, the median of {len(losses)} others' means"
    )


def _loss(search: SearchConfig, value: float) -> float:
    """Return the value such that less is better; what is no number is worst."""
    if math.isnan(value):
        return math.inf
    return value if search.mode == "min" else -value


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Return the quantile of ascending values, between two of them by their distance."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    if ordered[low] == ordered[high]:  # also infinite ones
        return ordered[low]
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
