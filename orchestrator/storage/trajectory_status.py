"""How each trajectory of a run ended: one small file each, read by `iterabre status` and on resume."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from actors.artifacts import list_files, read_bytes, write_bytes
from orchestrator.storage.layout import PLAN_SUFFIX
from orchestrator.storage.stage_store import Store

SUFFIX = ".json"


@dataclass(frozen=True)
class TrajectoryStatus:
    """`stopped` is the scheduler's doing, `cancelled` an operator's; one ended by a limit has none.

    `log` is that of the stage at which it failed, by its name in the run's directory of logs.
    """

    state: Literal["done", "failed", "stopped", "cancelled"]
    reason: str = ""
    log: str = ""


def write_status(store: Store, trajectory: str, status: TrajectoryStatus) -> None:
    """Write how a trajectory ended, in place of what an earlier run wrote."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    content = json.dumps(asdict(status) | {"when": now}, indent=1)
    write_bytes(store.trajectory_status_uri(trajectory), content.encode())


def read_statuses(store: Store) -> dict[str, TrajectoryStatus]:
    """Return the status of every trajectory that has one, by its id."""
    found: dict[str, TrajectoryStatus] = {}
    for info in list_files(store.trajectories_uri):
        if info.base_name.endswith(PLAN_SUFFIX):
            continue
        trajectory = info.base_name.removesuffix(SUFFIX)
        stored = json.loads(read_bytes(store.trajectory_status_uri(trajectory)) or b"{}")
        found[trajectory] = TrajectoryStatus(stored["state"], stored["reason"], stored.get("log", ""))
    return found
