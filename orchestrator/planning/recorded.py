"""The plans that a run recorded when it began: what was decided, with no model or text read again."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from actors.artifacts import list_files, read_bytes, write_bytes
from orchestrator.errors import RequestError, unknown_name
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.storage.layout import PLAN_SUFFIX
from orchestrator.storage.run_manifest import existing_run
from orchestrator.storage.stage_store import Store

WRITERS = 16
"""Plans that are written at a time: an object store takes as long for each as for all of these."""


def record_trajectories(store: Store, trajectories: Iterable[TrajectoryPlan]) -> None:
    """Write the plan of each trajectory into the run, in place of what an earlier version wrote."""

    def record(plan: TrajectoryPlan) -> None:
        content = json.dumps(plan.to_json(), indent=1, ensure_ascii=False)
        write_bytes(store.trajectory_plan_uri(plan.id), content.encode())

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(record, trajectories))


def recorded_trajectory(store: Store, trajectory_id: str) -> TrajectoryPlan:
    """Return the plan of a trajectory as the run recorded it.

    Raises:
        RequestError: there is no run, no such trajectory, or an earlier version recorded no plan of it.
    """
    planned = existing_run(store).get("planned") or {}
    files = [info.base_name for info in list_files(store.trajectories_uri)]
    recorded = {name.removesuffix(PLAN_SUFFIX) for name in files if name.endswith(PLAN_SUFFIX)}
    if trajectory_id not in recorded | planned.keys():
        raise unknown_name("trajectory", trajectory_id, recorded | planned.keys())
    content = b""
    if trajectory_id in recorded:
        content = read_bytes(store.trajectory_plan_uri(trajectory_id)) or b""
    try:
        return TrajectoryPlan.from_json(json.loads(content))
    except ValueError as error:
        raise RequestError(
            f"{store.uri} holds no plan of {trajectory_id} that this version can read, as it was started by "
            "an earlier one; give the campaign's command again with --resume: it records the plan, and "
            "computes nothing that is finished"
        ) from error
