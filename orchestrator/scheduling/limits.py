"""When a campaign ends early, in what order its trajectories start, and how long to wait before trying again.

Pure decisions; `orchestrator.execution.campaign` carries them out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from orchestrator.storage.ledger import measured_seconds

FIRST_BACKOFF_S = 5.0
LONGEST_BACKOFF_S = 300.0


@dataclass(frozen=True)
class Limits:
    """What ends a campaign; None where nothing does.

    `devices` is how many devices (GPUs, or CPUs where there are none) a stage of each
    kind holds, `price_per_hour` that of one device; kinds are those of `scheduling.resources`.
    `held_kinds` has the kinds of stages that hold other devices than their name says, by stage, phase and
    method as in the ledger.
    """

    max_failures: int | None = None
    time_limit_s: float | None = None
    budget: float | None = None
    price_per_hour: float = 0.0
    devices: Mapping[str, float] = field(default_factory=dict)
    held_kinds: Mapping[tuple[str, str | None, str], str] = field(default_factory=dict)

    def price(self, kind: str, seconds: float) -> float:
        """Return what a stage that took so long has cost."""
        return self.price_of(self.devices.get(kind, 0.0) * seconds)

    def price_of(self, device_s: float) -> float:
        """Return the price of so many device seconds."""
        return device_s / 3600 * self.price_per_hour


@dataclass(frozen=True)
class Spent:
    """What a campaign has used up so far."""

    failures: int = 0
    seconds: float = 0.0
    price: float = 0.0


def limit_reached(limits: Limits, spent: Spent) -> str | None:
    """Return why no further stage may start, in words for the user; None while all is well."""
    if limits.max_failures is not None and spent.failures >= limits.max_failures:
        return f"{spent.failures} trajectories failed (execution.max_failures: {limits.max_failures})"
    if limits.time_limit_s is not None and spent.seconds >= limits.time_limit_s:
        return f"{spent.seconds:.0f} s have passed (execution.time_limit_s: {limits.time_limit_s:g})"
    if limits.budget is not None and spent.price >= limits.budget:
        return f"{spent.price:.2f} is spent (execution.budget: {limits.budget:g})"
    return None


def start_order(remaining: Mapping[str, int], priorities: Mapping[str, int]) -> Sequence[str]:
    """Order trajectories by their priorities (0 if not given), and one that is nearly done first.

    Args:
        remaining: how many stages they still have to run.
    """
    return sorted(remaining, key=lambda name: (-priorities.get(name, 0), remaining[name]))


def backoff_s(attempt: int) -> float:
    """Return the seconds before a trajectory whose machine was lost is tried again; attempts from 0."""
    return min(FIRST_BACKOFF_S * 2**attempt, LONGEST_BACKOFF_S)


def spent_before(ledger: pa.Table, limits: Limits) -> float:
    """Return the price of all stages that a run has finished so far."""
    columns = ledger.select(["stage", "phase", "method", "key"]).to_pydict().values()
    kinds = {row[3]: limits.held_kinds.get(row[:3], row[0]) for row in zip(*columns, strict=True)}
    return sum(limits.price(kinds[key], took) for (_, key), took in measured_seconds(ledger).items())
