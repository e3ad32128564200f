"""Runs a campaign: one Ray Tune trial a trajectory, or one trajectory after another in this process."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from actors.evaluation import check_task_data
from orchestrator.backends import BACKENDS
from orchestrator.cluster import (
    QUIET,
    check_resources,
    cluster,
    cluster_capacity,
    grown,
    has_room_for_both,
    workers_output_to,
)
from orchestrator.config import CampaignConfig, ExecutionConfig, SearchConfig
from orchestrator.coordinator import AskedClaims, Coordinator, LimitReachedError
from orchestrator.cost import machine_of
from orchestrator.errors import IterabreError, unknown_name
from orchestrator.estimate import spent_before
from orchestrator.ledger import Ledger
from orchestrator.leftovers import sweep
from orchestrator.limits import Limits, backoff_s, devices_held, start_order
from orchestrator.metrics import CampaignGauges
from orchestrator.outcomes import TrajectoryOutcome, read_outcomes, write_outcome
from orchestrator.plan import CampaignPlan, TrajectoryPlan
from orchestrator.progress import Activity, Board, RemoteReport, Report, live_view
from orchestrator.run_file import check_run, open_run
from orchestrator.run_lock import check_unlocked, locked
from orchestrator.sharing import remaining_stages
from orchestrator.stages import Backend, OnIteration, StoredStages
from orchestrator.store import Store
from orchestrator.trackers import make_trackers
from orchestrator.tracking import published
from orchestrator.trajectory import run_trajectory

log = logging.getLogger(__name__)

HEAD = "node:__internal_head__"
TRIAL_PLACE = tune.PlacementGroupFactory([{HEAD: 0.001}])
"""A trial only waits for its stages: it takes no CPU, and lives on the head, never a spot machine."""

LOST_TRIAL_RETRIES = 3
"""How often a lost trial, or a trajectory that lost the machine of a stage, is tried again."""

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"

MakeBackend = Callable[[ExecutionConfig, Store], Backend]


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
    check_run(store, config.model_dump(mode="json"), resume)
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
        overlap = execution.overlap_evaluation and has_room_for_both(execution, capacity)
        workers_log = store.logs_dir / "workers.log"
        with (
            _run_log(store, config, plan),
            locked(store),
            workers_output_to(workers_log),
            _stopping_on_sigterm(),
        ):
            with published(trackers, plan, store):
                outcome = run_trials(config, plan, store, limits, overlap=overlap)
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
            failure = _follow(trajectory, backend, store, board.post, call)
            failures |= {trajectory.id: failure} if failure else {}
    return Outcome(failures, limit=coordinator.ended_by())


def run_trials(
    config: CampaignConfig,
    plan: CampaignPlan,
    store: Store,
    limits: Limits,
    make_backend: MakeBackend = BACKENDS["ray"],
    overlap: bool = False,
) -> Outcome:
    """Run the trajectories as trials of Ray Tune, on the connected cluster.

    Trials begun again find their finished stages in the store, so Tune need not restore anything.
    """
    os.environ.update(QUIET)
    execution = config.execution
    board = ray.remote(num_cpus=0)(Board).remote()
    price = spent_before(Ledger(store.ledger_uri).read(), limits)
    coordinator = ray.remote(num_cpus=0, max_restarts=-1)(Coordinator).remote(limits, price)
    trajectories = list(_unfinished(plan, store))
    if not trajectories:
        return Outcome({})
    trainable = tune.with_parameters(
        _trial,
        plan=plan,
        execution=execution,
        store=store,
        board=board,
        overlap=overlap,
        coordinator=coordinator,
        make_backend=make_backend,
        metric=None if config.search.scheduler == "none" else config.search.metric,
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, TRIAL_PLACE),
        param_space={"trajectory": tune.grid_search(trajectories)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=execution.max_concurrent_trajectories,
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
            failures[trajectory] = _last_line(result.error)
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


def _trial(
    parameters: Mapping[str, str],
    plan: CampaignPlan,
    execution: ExecutionConfig,
    store: Store,
    board: Any,
    overlap: bool,
    coordinator: Any,
    make_backend: MakeBackend,
    metric: str | None,
) -> None:
    """A Tune trial: one trajectory. What was lost is tried again; what is wrong is reported."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    trajectory = plan.find(parameters["trajectory"])

    def call(method: str, *arguments: Any) -> Any:
        return ray.get(getattr(coordinator, method).remote(*arguments))

    def on_iteration(iteration: int, metrics: Mapping[str, float]) -> None:
        assert metric is not None, "nobody listens without a metric"
        if metric not in metrics:
            raise unknown_name("search.metric", metric, metrics)
        tune.report({"iteration": iteration, "compared": metrics[metric]})

    follow = partial(
        _follow,
        trajectory,
        make_backend(execution, store),
        store,
        RemoteReport(board),
        call,
        on_iteration if metric else None,
        overlap,
    )
    failure = _despite_losses(follow)
    tune.report({"failure": failure or "", "ended": True})


def _despite_losses(follow: Callable[[], str | None]) -> str | None:
    """Follow a trajectory, again after a growing pause when a process or machine of a stage was lost."""
    for attempt in range(LOST_TRIAL_RETRIES):
        try:
            return follow()
        except RayError as lost:
            pause_s = backoff_s(attempt)
            log.warning("something was lost (%s); trying again in %.0f s", _last_line(lost), pause_s)
            time.sleep(pause_s)
    return follow()


def _last_line(error: BaseException) -> str:
    """What went wrong, without the trace of the processes it went through; the logs have that."""
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _follow(
    trajectory: TrajectoryPlan,
    backend: Backend,
    store: Store,
    report: Report,
    call: Callable[..., Any],
    on_iteration: OnIteration | None = None,
    overlap: bool = False,
) -> str | None:
    """Run one trajectory; the reason if it failed in a way that trying again cannot mend."""
    stages = StoredStages(trajectory, store, backend, report, AskedClaims(call), on_iteration, overlap)
    try:
        run_trajectory(trajectory, stages)
    except LimitReachedError as limit:
        log.warning("%s ends at iteration %d: %s", trajectory.id, stages.activity.iteration, limit)
        report(replace(stages.activity, stage="ended early", finished=True))
        return None
    except IterabreError as error:
        log.error("%s failed: %s", trajectory.id, error)
        report(replace(stages.activity, stage="failed", finished=True))
        write_outcome(store, trajectory.id, TrajectoryOutcome("failed", str(error)))
        call("fail", trajectory.id)
        return str(error)
    report(replace(stages.activity, finished=True))
    write_outcome(store, trajectory.id, TrajectoryOutcome("done"))
    return None


@contextmanager
def _run_log(store: Store, config: CampaignConfig, plan: CampaignPlan) -> Iterator[None]:
    """Open the run and keep this process's log in it."""
    planned = {trajectory.id: len(trajectory.iterations) for trajectory in plan.trajectories}
    open_run(store, config.model_dump(mode="json"), resume=True, planned=planned)
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
