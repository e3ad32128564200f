"""What a campaign took: seconds of every kind of stage, by method."""

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.reporting.data.comparisons import Grid
from orchestrator.reporting.data.measured import Number
from orchestrator.reporting.tables.tables import STAGES, Line

LEAST_HOURS = 10
"""Campaigns of less are tabulated in minutes."""

SECONDS = {"min": 60, "h": 3600}
IN_WORDS = {"min": "Minutes", "h": "Hours"}


def cost_grid(ledger: pa.Table) -> Grid | None:
    """Tabulate the cost of each method as if it had run alone; the last line has every stage once."""
    timed = (
        ledger.filter(pc.field("metric") == "seconds").select(["method", "stage", "key", "value"]).to_pylist()
    )
    seconds: dict[str, dict[str, tuple[str, float]]] = {}
    for row in timed:
        seconds.setdefault(row["method"], {})[row["key"]] = (row["stage"], row["value"])
    if not seconds:
        return None
    together = {key: spent for own in seconds.values() for key, spent in own.items()}
    kinds = [kind for kind in STAGES if any(stage == kind for stage, _ in together.values())]
    unit = "min" if sum(spent for _, spent in together.values()) < LEAST_HOURS * 3600 else "h"
    return Grid(
        "cost",
        "Cost",
        f"{IN_WORDS[unit]} from start to end of the stages that each method needs, as if it had run alone. "
        "What methods have in common was computed once: the last line counts it once.",
        (
            *(_line(name, own, kinds, unit) for name, own in seconds.items()),
            _line("the campaign", together, kinds, unit),
        ),
    )


def _line(name: str, spent: dict[str, tuple[str, float]], kinds: list[str], unit: str) -> Line:
    times = {
        kind: sum(seconds for stage, seconds in spent.values() if stage == kind) / SECONDS[unit]
        for kind in kinds
    }
    return {
        "method": name,
        "stages": len(spent),
        **{f"{kind} {unit}": Number(time, None, "") for kind, time in times.items()},
        f"all {unit}": Number(sum(times.values()), None, ""),
    }
