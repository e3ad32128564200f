"""How each trajectory of a run ended: one small file each, read by `iterabre status` and on resume."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from actors.artifacts import list_files, read_bytes, write_bytes
from orchestrator.storage.layout import PLAN_SUFFIX
from orchestrator.storage.stage_store import Store

SUFFIX = ".json"

READERS = 16
"""Files that are read at a time: an object store takes as long for each as for all of these."""


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


def failed_since(store: Store, started_at: float) -> list[str]:
    """Return the trajectories that have failed since that time, in seconds since the epoch."""
    since = int(started_at)
    ended = {
        trajectory: datetime.fromisoformat(stored["when"]).timestamp()
        for trajectory, stored in _stored(store).items()
        if stored["state"] == "failed"
    }
    return [trajectory for trajectory, when in ended.items() if when >= since]


def read_statuses(store: Store) -> dict[str, TrajectoryStatus]:
    """Return the status of every trajectory that has one, by its id."""
    return {
        trajectory: TrajectoryStatus(stored["state"], stored["reason"], stored.get("log", ""))
        for trajectory, stored in _stored(store).items()
    }


def _stored(store: Store) -> dict[str, dict[str, Any]]:
    names = [info.base_name for info in list_files(store.trajectories_uri)]
    trajectories = [name.removesuffix(SUFFIX) for name in names if not name.endswith(PLAN_SUFFIX)]
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(pool.map(read_bytes, map(store.trajectory_status_uri, trajectories)))
    found = zip(trajectories, contents, strict=True)
    return {trajectory: json.loads(content or b"{}") for trajectory, content in found}
