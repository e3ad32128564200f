"""Runs a campaign: one Ray Tune trial a trajectory, or one trajectory after another in this process."""

import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from actors.evaluation import check_task_data
from orchestrator.config import CampaignConfig, SearchConfig
from orchestrator.execution.backends import BACKENDS
from orchestrator.execution.cluster import (
    HEAD,
    QUIET,
    ClusterRoom,
    check_resources,
    cluster,
    cluster_capacity,
    end_helpers_of_dead_drivers,
    grown,
    trajectories_at_a_time,
    workers_output_to,
)
from orchestrator.execution.dry_run import remaining_stages
from orchestrator.execution.gauges import CampaignGauges
from orchestrator.execution.progress import Activity, Board, live_view
from orchestrator.execution.tune import LOG_FORMAT, LOST_TRIAL_RETRIES, MakeBackend, follow, last_line, trial
from orchestrator.planning.cost_model import machine_of
from orchestrator.planning.estimate import spent_before
from orchestrator.planning.plan import CampaignPlan
from orchestrator.scheduling.admission import Places, devices_held, needs_of
from orchestrator.scheduling.coordinator import Coordinator
from orchestrator.scheduling.limits import Limits, start_order
from orchestrator.storage.garbage_collector import sweep
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.run_lock import check_unlocked, locked
from orchestrator.storage.run_manifest import check_run, open_run
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import TrajectoryOutcome, read_outcomes, write_outcome
from orchestrator.tracking.publisher import published
from orchestrator.tracking.trackers import make_trackers

log = logging.getLogger(__name__)

TRIAL_PLACE = tune.PlacementGroupFactory([{HEAD: 0.001}])
"""A trial only waits for its stages: it takes no CPU, and lives on the head, never a spot machine."""


@dataclass(frozen=True)
class Outcome:
    """How a campaign ended.

    `failures` has the reason of every trajectory that failed, `stopped` the trajectories that
    the scheduler gave up, `limit` the limit that ended the campaign early.
    """

    failures: Mapping[str, str]
    stopped: Sequence[str] = ()
    limit: str | None = None


def run_campaign(
    config: CampaignConfig, plan: CampaignPlan, store: Store, *, resume: bool, address: str | None = None
) -> Outcome:
    """Run every trajectory of `plan` that is not finished in `store`.

    A trajectory that fails is recorded with its reason and does not stop the others.
    Nothing is written before all checks have passed.

    Args:
        resume: go on with the run that `store` holds.
        address: a Ray cluster to join; RAY_ADDRESS or a cluster of this machine's own if None.

    Raises:
        RequestError: `store` cannot be written, holds another run, or is in use; data of a task or what
            a tracker needs is missing.
        ClusterTooSmallError: the cluster can never give what `config.execution` asks for.
    """
    execution = config.execution
    check_run(store, config.model_dump(mode="json"), resume, config.directories)
    limits = limits_of(config)
    check_unlocked(store)
    for evaluation in {trajectory.evaluation for trajectory in plan.trajectories}:
        check_task_data(evaluation.tasks, evaluation.include_path, evaluation.num_fewshot)
    for task in {trajectory.score_spec(trajectory.dense).task for trajectory in plan.trajectories}:
        if task is not None:
            check_task_data((task.name,), task.include_path, task.num_fewshot)
    trackers = make_trackers(config, store)
    store.check_writable(plan.needed_bytes())
    os.environ.update(QUIET)
    if execution.backend == "local":
        with _run_log(store, config, plan), locked(store), _stopping_on_sigterm():
            with published(trackers, plan, store):
                outcome = _run_in_this_process(config, plan, store, limits)
            sweep(store)
            return outcome
    with cluster(address):
        capacity = grown(cluster_capacity(), execution.cluster_maximum)
        check_resources(execution, capacity)
        end_helpers_of_dead_drivers()
        places = Places(ClusterRoom(execution.cluster_maximum), needs_of(execution))
        at_a_time = trajectories_at_a_time(execution, places, capacity.head_bytes)
        workers_log = store.logs_dir / "workers.log"
        with (
            _run_log(store, config, plan),
            locked(store),
            workers_output_to(workers_log),
            _stopping_on_sigterm(),
        ):
            with published(trackers, plan, store):
                outcome = run_trials(config, plan, store, limits, at_a_time, places)
            sweep(store)
            return outcome


def limits_of(config: CampaignConfig) -> Limits:
    """The campaign's limits, with what a device costs.

    Raises:
        RequestError: `cost.machine` is no known machine.
    """
    execution = config.execution
    return Limits(
        max_failures=execution.max_failures,
        time_limit_s=execution.time_limit_s,
        budget=execution.budget,
        price_per_hour=machine_of(config.cost, config.cost.machine).price_per_hour,
        devices=devices_held(execution),
    )


def _unfinished(plan: CampaignPlan, store: Store) -> Sequence[str]:
    """Trajectories to run, a nearly done one first; not those that a scheduler gave up in an earlier run."""
    given_up = {name for name, outcome in read_outcomes(store).items() if outcome.state == "stopped"}
    going = [trajectory for trajectory in plan.trajectories if trajectory.id not in given_up]
    return start_order({trajectory.id: remaining_stages(trajectory, store) for trajectory in going})


def _run_in_this_process(config: CampaignConfig, plan: CampaignPlan, store: Store, limits: Limits) -> Outcome:
    board = Board()
    coordinator = Coordinator(limits, spent_before(Ledger(store.ledger_uri).read(), limits))
    failures: dict[str, str] = {}

    def call(method: str, *arguments: Any) -> Any:
        return getattr(coordinator, method)(*arguments)

    backend = BACKENDS["local"](config.execution, store)
    with live_view(board.snapshot):
        for trajectory_id in _unfinished(plan, store):
            trajectory = plan.find(trajectory_id)
            failure = follow(trajectory, backend, store, board.post, call)
            failures |= {trajectory.id: failure} if failure else {}
    return Outcome(failures, limit=coordinator.ended_by())


def run_trials(
    config: CampaignConfig,
    plan: CampaignPlan,
    store: Store,
    limits: Limits,
    at_a_time: int,
    places: Places | None = None,
    make_backend: MakeBackend = BACKENDS["ray"],
) -> Outcome:
    """Run the trajectories as trials of Ray Tune, `at_a_time` of them, on the connected cluster.

    Stages wait for one of `places`, if there are any to wait for.
    Trials begun again find their finished stages in the store, so Tune need not restore anything.
    """
    os.environ.update(QUIET)
    execution = config.execution
    board = ray.remote(num_cpus=0)(Board).remote()
    price = spent_before(Ledger(store.ledger_uri).read(), limits)
    # A trajectory may wait for a stage and for one in the background, and renews its claims meanwhile.
    many = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 3 * at_a_time + 8}
    coordinator = ray.remote(**many)(Coordinator).remote(limits, price, places)
    trajectories = list(_unfinished(plan, store))
    if not trajectories:
        return Outcome({})
    trainable = tune.with_parameters(
        trial,
        plan=plan,
        execution=execution,
        store=store,
        board=board,
        overlap=execution.overlap_evaluation,
        coordinator=coordinator,
        make_backend=make_backend,
        metric=None if config.search.scheduler == "none" else config.search.metric,
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, TRIAL_PLACE),
        param_space={"trajectory": tune.grid_search(trajectories)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_a_time,
            scheduler=trial_scheduler(config.search, max(len(t.iterations) for t in plan.trajectories)),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}",
            storage_path=store.tune_uri,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=LOST_TRIAL_RETRIES),
        ),
    )
    gauges = CampaignGauges(config.name)

    def snapshot() -> list[Activity]:
        activities: list[Activity] = ray.get(board.snapshot.remote())
        gauges.show(activities)
        return activities

    with live_view(snapshot):
        results = tuner.fit()
    return _outcome(results, store, ray.get(coordinator.ended_by.remote()))


def _outcome(results: tune.ResultGrid, store: Store, limit: str | None) -> Outcome:
    """What became of the trials; those that ended without a word of their own were given up or lost."""
    failures: dict[str, str] = {}
    stopped: list[str] = []
    for result in results:
        trajectory, metrics = result.config["trajectory"], result.metrics or {}
        if result.error:
            failures[trajectory] = last_line(result.error)
            write_outcome(store, trajectory, TrajectoryOutcome("failed", failures[trajectory]))
        elif metrics.get("failure"):
            failures[trajectory] = metrics["failure"]
        elif not metrics.get("ended"):
            reason = f"given up by the scheduler after iteration {metrics.get('iteration')}"
            write_outcome(store, trajectory, TrajectoryOutcome("stopped", reason))
            stopped.append(trajectory)
    return Outcome(failures, tuple(stopped), limit)


def trial_scheduler(search: SearchConfig, iterations: int) -> TrialScheduler | None:
    """Ray Tune's scheduler for `search`; None lets every trajectory run to its end."""
    compared: dict[str, Any] = {"time_attr": "iteration", "metric": "compared", "mode": search.mode}
    grace = min(search.grace_iterations, iterations)
    if search.scheduler == "asha":
        return ASHAScheduler(
            **compared,
            grace_period=grace,
            # Beyond the last iteration: a trajectory that gets there is done anyway.
            max_t=iterations + 1,
            reduction_factor=search.reduction_factor,
            stop_last_trials=False,
        )
    if search.scheduler == "median_stopping":
        return MedianStoppingRule(**compared, grace_period=grace)
    return None


@contextmanager
def _run_log(store: Store, config: CampaignConfig, plan: CampaignPlan) -> Iterator[None]:
    """Open the run and keep this process's log in it."""
    planned = {trajectory.id: len(trajectory.iterations) for trajectory in plan.trajectories}
    trajectories = [
        {
            "trajectory": trajectory.id,
            "model": trajectory.model_id,
            "method": trajectory.method.name,
            "depths": [round_.layers_left for round_ in trajectory.iterations if round_.is_measured],
        }
        for trajectory in plan.trajectories
    ]
    open_run(store, config.model_dump(mode="json"), True, planned, config.directories, trajectories)
    store.logs_dir.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(store.logs_dir / "driver.log")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """End as on Ctrl-C when the job is stopped; entered after Ray installed its own handler, which aborts."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
