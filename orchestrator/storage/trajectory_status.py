"""How each trajectory of a run ended: one small file each, read by `iterabre status` and on resume."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from actors.artifacts import list_files, read_bytes, write_bytes
from orchestrator.storage.stage_store import Store

SUFFIX = ".json"


@dataclass(frozen=True)
class TrajectoryOutcome:
    """`stopped` is the scheduler's doing; a trajectory that a limit ended has no outcome yet."""

    state: Literal["done", "failed", "stopped"]
    reason: str = ""


def write_outcome(store: Store, trajectory: str, outcome: TrajectoryOutcome) -> None:
    """Note how a trajectory ended; what stood there of an earlier run is replaced."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_bytes(store.outcome_uri(trajectory), json.dumps(asdict(outcome) | {"when": now}, indent=1).encode())


def read_outcomes(store: Store) -> dict[str, TrajectoryOutcome]:
    """Outcome of every trajectory that has one, by its id."""
    found: dict[str, TrajectoryOutcome] = {}
    for info in list_files(store.outcomes_uri):
        trajectory = info.base_name.removesuffix(SUFFIX)
        stored = json.loads(read_bytes(store.outcome_uri(trajectory)) or b"{}")
        found[trajectory] = TrajectoryOutcome(stored["state"], stored["reason"])
    return found
