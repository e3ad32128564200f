"""What a campaign took: seconds of every kind of stage, by method."""

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.reporting.data.comparisons import Grid
from orchestrator.reporting.data.measured import Number
from orchestrator.reporting.tables.tables import STAGES, Line


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
    lines = [_line(name, own, kinds) for name, own in seconds.items()]
    return Grid(
        "cost",
        "Cost",
        "Hours from start to end of the stages that each method needs, as if it had run alone. What methods "
        "have in common was computed once: the last line counts it once.",
        (*lines, _line("the campaign", together, kinds)),
    )


def _line(name: str, spent: dict[str, tuple[str, float]], kinds: list[str]) -> Line:
    hours = {
        kind: Number(sum(seconds for stage, seconds in spent.values() if stage == kind) / 3600, None, "")
        for kind in kinds
    }
    total = Number(sum(number.value for number in hours.values()), None, "")
    return {
        "method": name,
        "stages": len(spent),
        **{f"{kind} h": hours[kind] for kind in kinds},
        "all h": total,
    }
