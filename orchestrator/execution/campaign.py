"""Runs a campaign: one Ray Tune trial a trajectory, or one trajectory after another in this process."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

from actors.artifacts import PATIENCE_VARIABLE
from actors.evaluation import check_task_data
from actors.stage_output import LOG_FORMAT
from orchestrator.config import CampaignConfig
from orchestrator.execution.cluster import (
    QUIET,
    ClusterNodes,
    cluster,
    cluster_nodes,
    end_helpers_of_dead_drivers,
    head_memory_bytes,
    node_types,
    trajectories_at_a_time,
    workers_output_to,
)
from orchestrator.execution.connection import LOCAL, cluster_address
from orchestrator.execution.control import control_reader
from orchestrator.execution.dry_run import campaign_stages, unfinished_trajectories
from orchestrator.execution.local import LocalBackend
from orchestrator.execution.progress import ProgressBoard
from orchestrator.execution.stopping import StopRequest
from orchestrator.execution.trial import run_trial
from orchestrator.execution.tune import CampaignOutcome, run_trials
from orchestrator.planning.changes import Change, Effect, described
from orchestrator.planning.cost_model import machine_of
from orchestrator.planning.estimate import expected_seconds
from orchestrator.planning.plan import CampaignPlan
from orchestrator.planning.recorded import check_changes, continue_plan, record_trajectories
from orchestrator.planning.stages import count_stages
from orchestrator.reporting.data.overview import overview
from orchestrator.reporting.live_view import live_view
from orchestrator.scheduling.admission import AdmissionController, check_resources, check_speeds_compare
from orchestrator.scheduling.coordinator import Coordinator
from orchestrator.scheduling.limits import Limits, spent_before
from orchestrator.scheduling.resources import devices_held, held_kinds, stage_resources
from orchestrator.storage.garbage_collector import collect
from orchestrator.storage.run_lock import check_unlocked, locked
from orchestrator.storage.run_manifest import check_run, open_run, update_run
from orchestrator.storage.run_progress import progress_written
from orchestrator.storage.stage_logs import DRIVER_LOG, LogWriter, StageLogHandler, WorkerOutput
from orchestrator.storage.stage_store import Store
from orchestrator.storage.superseded import paid_rows
from orchestrator.tracking.publisher import Tracker, published
from orchestrator.tracking.trackers import make_trackers

log = logging.getLogger(__name__)


def run_campaign(
    config: CampaignConfig,
    plan: CampaignPlan,
    store: Store,
    *,
    resume: bool,
    address: str | None = None,
    accept_changes: bool = False,
    tell: Callable[[str], None] = log.info,
) -> CampaignOutcome:
    """Run every trajectory of `plan` that is not finished in `store`.

    A trajectory that fails is recorded with its reason and does not stop the others.
    Nothing is written before all checks have passed.

    Args:
        resume: go on with the run that `store` holds.
        address: a Ray cluster to join; RAY_ADDRESS or a cluster of this machine's own if None.
        accept_changes: go on even if what the run is of has changed, such as a model under its id.
        tell: is called, in words for the user, with what goes on, with what has changed since the run was
            recorded, and with where trackers show it.

    Raises:
        RequestError: `store` cannot be written, holds another run, or is in use; data of a task or what
            a tracker needs is missing.
        ClusterTooSmallError: the cluster can never give what `config.execution` requests.
    """
    execution = config.execution
    os.environ[PATIENCE_VARIABLE] = str(config.storage.retry_s)
    check_run(store, resume)
    plan, changes = continue_plan(plan, config, store)
    check_changes(store, changes, accept_changes)
    if changes:
        tell(f"Changed since this run was recorded:\n{described(changes)}")
    if any(change.effect is not Effect.HARMLESS for change in changes):
        stages = count_stages(chain(*campaign_stages(plan, store).values()))
        tell(
            f"Stages: {stages.finished} of {stages.distinct} are finished, {stages.to_run} are to be computed"
        )
    limits = limits_of(config)
    check_unlocked(store)
    _check_tasks(plan)
    trackers = make_trackers(config, store)
    store.check_writable(plan.needed_bytes())
    os.environ.update(QUIET)
    if execution.backend == "local":
        with _running(config, plan, store, trackers, LogWriter(store), changes, tell) as stop:
            return _run_in_this_process(config, plan, store, limits, stop)
    return _run_on_cluster(config, plan, store, trackers, limits, changes, address, tell)


def _check_tasks(plan: CampaignPlan) -> None:
    """Raise RequestError for data of a task that cannot be had."""
    for evaluation in {trajectory.evaluation for trajectory in plan.trajectories}:
        check_task_data(evaluation.tasks, evaluation.include_path, evaluation.num_fewshot)
    for task in {trajectory.score_spec(trajectory.dense).task for trajectory in plan.trajectories}:
        if task is not None:
            check_task_data((task.name,), task.include_path, task.num_fewshot)


@contextmanager
def _running(
    config: CampaignConfig,
    plan: CampaignPlan,
    store: Store,
    trackers: Mapping[str, Tracker],
    logs: LogWriter,
    changes: Sequence[Change],
    tell: Callable[[str], None],
) -> Iterator[StopRequest]:
    """Open the run, hold it alone, publish its numbers; then remove what interrupted attempts left."""
    stop = StopRequest(config.execution.stop_timeout_s)
    with _run_log(store, config, plan, logs), locked(store), logs.uploading(), stop.on_signals():
        record_trajectories(store, plan.trajectories)
        if changes:
            update_run(store, *_manifest(config, plan), [str(change) for change in changes])
        with published(trackers, plan, store, tell):
            yield stop
        collect(store)


def limits_of(config: CampaignConfig) -> Limits:
    """Return the campaign's limits, with what a device costs.

    Raises:
        RequestError: `cost.machine` is no known machine.
    """
    execution = config.execution
    methods = [config.method_for(model, method) for model in config.models for method in config.methods]
    return Limits(
        max_failures=execution.max_failures,
        time_limit_s=execution.time_limit_s,
        budget=execution.budget,
        price_per_hour=machine_of(config.cost, config.cost.machine).price_per_hour,
        devices=devices_held(execution),
        held_kinds=held_kinds(methods),
    )


def _run_on_cluster(
    config: CampaignConfig,
    plan: CampaignPlan,
    store: Store,
    trackers: Mapping[str, Tracker],
    limits: Limits,
    changes: Sequence[Change],
    address: str | None,
    tell: Callable[[str], None],
) -> CampaignOutcome:
    """Run the trajectories as trials, as many at a time as the cluster can feed."""
    execution = config.execution
    own = cluster_address(address) == LOCAL
    tell("Starting Ray on this machine" if own else "Joining the Ray cluster")
    with cluster(address):
        requests, nodes = stage_resources(execution), cluster_nodes(execution)
        check_resources(requests, nodes, execution.max_devices)
        if any(trajectory.evaluation.throughput for trajectory in plan.trajectories):
            check_speeds_compare(requests["evaluate"], nodes)
        end_helpers_of_dead_drivers()
        admission = AdmissionController(ClusterNodes(node_types(execution)), requests, execution.max_devices)
        at_a_time = trajectories_at_a_time(
            execution, admission.concurrent_trajectories(nodes), head_memory_bytes()
        )
        tell(
            f"{len(plan.trajectories)} trajectories, up to {at_a_time} at a time, on "
            f"{sum(node.is_up for node in nodes)} nodes with {sum(node.cpus for node in nodes):g} CPUs and "
            f"{sum(node.gpus for node in nodes):g} GPUs"
        )
        logs = LogWriter(store)
        with (
            _running(config, plan, store, trackers, logs, changes, tell) as stop,
            workers_output_to(WorkerOutput(logs)),
        ):
            return run_trials(config, plan, store, limits, at_a_time, admission, stop=stop)


def _run_in_this_process(
    config: CampaignConfig, plan: CampaignPlan, store: Store, limits: Limits, stop: StopRequest
) -> CampaignOutcome:
    board = ProgressBoard()
    price = spent_before(paid_rows(store), limits)
    coordinator = Coordinator(limits, price, control=control_reader(config, plan, store))
    failures: dict[str, str] = {}
    backend = LocalBackend(config.execution, store)
    trajectories = unfinished_trajectories(plan, store, control_reader(config, plan, store)())
    planned = {name: len(plan.find(name).iterations) for name in trajectories}
    whole = partial(overview, trajectories, expected_seconds(config, plan, trajectories), time.time())
    with (
        live_view(board.snapshot, planned, whole),
        progress_written(store, board.snapshot, overview=whole),
        stop.calls(coordinator.stop),
    ):
        for trajectory_id in trajectories:
            failure = run_trial(plan.find(trajectory_id), backend, store, board.post, coordinator)
            failures |= {trajectory_id: failure} if failure else {}
    cancelled = tuple(each.id for each in plan.trajectories if coordinator.is_cancelled(each.id))
    return CampaignOutcome(failures, limit=coordinator.ended_by(), cancelled=cancelled)


@contextmanager
def _run_log(store: Store, config: CampaignConfig, plan: CampaignPlan, logs: LogWriter) -> Iterator[None]:
    """Open the run and keep this process's log in it."""
    open_run(store, *_manifest(config, plan))
    store.logs_dir.mkdir(parents=True, exist_ok=True)
    driver_log = logging.FileHandler(store.logs_dir / DRIVER_LOG)
    driver_log.setFormatter(logging.Formatter(LOG_FORMAT))
    handlers = (driver_log, StageLogHandler(logs))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def _manifest(
    config: CampaignConfig, plan: CampaignPlan
) -> tuple[dict[str, Any], dict[str, int], Sequence[str], list[dict[str, Any]]]:
    """Return what is recorded of a campaign, as the arguments of `open_run`."""
    planned = {trajectory.id: len(trajectory.iterations) for trajectory in plan.trajectories}
    trajectories: list[dict[str, Any]] = [
        {
            "trajectory": trajectory.id,
            "model": trajectory.model_id,
            "method": trajectory.method.name,
            "depths": [round_.layers_left for round_ in trajectory.iterations if round_.is_measured],
        }
        for trajectory in plan.trajectories
    ]
    return config.model_dump(mode="json"), planned, config.directories, trajectories
