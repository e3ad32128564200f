"""The models that a run is to measure and has not measured yet, so that nothing is said in their place."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.reporting.data.measured import RECOVERED, Measured


@dataclass(frozen=True)
class Due:
    """A trajectory's model at one depth, planned or pruned already, and not measured after recovery.

    `reached` if it is pruned already. `ended` if it never will be measured: its trajectory failed or was
    given up.
    """

    model: str
    method: str
    layers: int
    reached: bool
    ended: bool


def due_models(
    ledger: pa.Table,
    models: Iterable[Measured],
    planned: Sequence[Mapping[str, Any]] = (),
    ended: Iterable[str] = (),
) -> list[Due]:
    """Return every model that is still to be measured.

    Args:
        planned: `trajectory`, `model`, `method` and `depths` of each trajectory, as the run's file has
            them; of a trajectory that is missing here, only what is pruned already is known.
        ended: trajectories that failed or were given up.
    """
    measured = {(model.trajectory, model.layers) for model in models if model.phase == RECOVERED}
    ended = set(ended)
    pruned = ledger.filter((pc.field("stage") == "prune") & (pc.field("metric") == "layers")).to_pylist()
    reached = {(row["trajectory"], int(row["value"])): (row["model"], row["method"]) for row in pruned}
    known = {one["trajectory"] for one in planned}
    places = {
        (one["trajectory"], depth): (one["model"], one["method"])
        for one in planned
        for depth in one["depths"]
    } | {place: names for place, names in reached.items() if place[0] not in known}
    return [
        Due(model, method, depth, (trajectory, depth) in reached, trajectory in ended)
        for (trajectory, depth), (model, method) in places.items()
        if (trajectory, depth) not in measured
    ]
