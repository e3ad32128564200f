"""Trajectories as trials of Ray Tune, each followed to its end in a process of its own.

A trial waits for its stages and computes nothing, so nothing that computes is imported here:
on the head there is such a process for every trajectory that is under way.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from actors.errors import last_line
from orchestrator.config import CampaignConfig, ExecutionConfig, SearchConfig
from orchestrator.errors import IterabreError, UnexpectedError, unexpected, unknown_name
from orchestrator.execution.cluster import HEAD, QUIET
from orchestrator.execution.dry_run import planned_stages, unfinished_trajectories
from orchestrator.execution.gauges import CampaignGauges
from orchestrator.execution.progress import (
    ProgressBoard,
    RemoteReport,
    Report,
    TrajectoryProgress,
    live_view,
)
from orchestrator.execution.ray import RayBackend, RayCoordinatorClient
from orchestrator.execution.resolvers import ComputeResolver
from orchestrator.execution.stage_kinds import Backend
from orchestrator.execution.stage_runner import OnIteration, StageRunner
from orchestrator.execution.trajectory import run_trajectory
from orchestrator.planning.plan import CampaignPlan, TrajectoryPlan
from orchestrator.scheduling.admission import AdmissionController
from orchestrator.scheduling.coordinator import Coordinator, CoordinatorClient, Leases, LimitReachedError
from orchestrator.scheduling.limits import Limits, backoff_s, spent_before
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import TrajectoryStatus, write_status

log = logging.getLogger(__name__)

TRIAL_RESOURCES = tune.PlacementGroupFactory([{HEAD: 0.001}])
"""A trial only waits for its stages: it takes no CPU, and runs on the head, never a spot machine."""

LOST_TRIAL_RETRIES = 3
"""How often a lost trial, or a trajectory that lost the machine of a stage, is tried again."""

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"

MakeBackend = Callable[[ExecutionConfig, Store], Backend]


@dataclass(frozen=True)
class CampaignOutcome:
    """How a campaign ended.

    `failures` has the reason of every trajectory that failed, `stopped` the trajectories that
    the scheduler gave up, `limit` the limit that ended the campaign early.
    """

    failures: Mapping[str, str]
    stopped: Sequence[str] = ()
    limit: str | None = None


def run_trials(
    config: CampaignConfig,
    plan: CampaignPlan,
    store: Store,
    limits: Limits,
    at_a_time: int,
    admission: AdmissionController | None = None,
    make_backend: MakeBackend = RayBackend,
) -> CampaignOutcome:
    """Run the trajectories as trials of Ray Tune, `at_a_time` of them, on the connected cluster.

    Stages wait for `admission`, if it is given. Trials begun again find their finished stages
    in the store, so Tune need not restore anything.
    """
    os.environ.update(QUIET)
    trajectories = unfinished_trajectories(plan, store)
    if not trajectories:
        return CampaignOutcome({})
    board = ray.remote(num_cpus=0)(ProgressBoard).remote()
    price = spent_before(Ledger(store.ledger_uri).read(), limits)
    # A trajectory may wait for a stage and for one in the background, and renews its leases meanwhile.
    many = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 3 * at_a_time + 8}
    coordinator = RayCoordinatorClient(ray.remote(**many)(Coordinator).remote(limits, price, admission))
    trainable = tune.with_parameters(
        trial,
        plan=plan,
        execution=config.execution,
        store=store,
        board=board,
        coordinator=coordinator,
        make_backend=make_backend,
        metric=None if config.search.scheduler == "none" else config.search.metric,
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, TRIAL_RESOURCES),
        param_space={"trajectory": tune.grid_search(list(trajectories))},
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

    def snapshot() -> list[TrajectoryProgress]:
        shown: list[TrajectoryProgress] = ray.get(board.snapshot.remote())
        gauges.show(shown)
        return shown

    with live_view(snapshot):
        results = tuner.fit()
    return _campaign_outcome(results, store, coordinator.ended_by())


def _campaign_outcome(results: tune.ResultGrid, store: Store, limit: str | None) -> CampaignOutcome:
    """Collect how the trials ended; those that reported no end of their own were given up or lost."""
    failures: dict[str, str] = {}
    stopped: list[str] = []
    for result in results:
        trajectory, metrics = result.config["trajectory"], result.metrics or {}
        if result.error:
            failures[trajectory] = last_line(result.error)
            write_status(store, trajectory, TrajectoryStatus("failed", failures[trajectory]))
        elif metrics.get("failure"):
            failures[trajectory] = metrics["failure"]
        elif not metrics.get("ended"):
            reason = f"given up by the scheduler after iteration {metrics.get('iteration')}"
            write_status(store, trajectory, TrajectoryStatus("stopped", reason))
            stopped.append(trajectory)
    return CampaignOutcome(failures, tuple(stopped), limit)


def trial_scheduler(search: SearchConfig, iterations: int) -> TrialScheduler | None:
    """Return Ray Tune's scheduler for `search`; None lets every trajectory run to its end."""
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


def trial(
    parameters: Mapping[str, str],
    plan: CampaignPlan,
    execution: ExecutionConfig,
    store: Store,
    board: Any,
    coordinator: CoordinatorClient,
    make_backend: MakeBackend,
    metric: str | None,
) -> None:
    """Run one trajectory as a trial of Tune. What was lost is tried again; what is wrong is reported."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    trajectory = plan.find(parameters["trajectory"])

    def on_iteration(iteration: int, metrics: Mapping[str, float]) -> None:
        assert metric is not None, "nothing is compared without a metric"
        if metric not in metrics:
            raise unknown_name("search.metric", metric, metrics)
        tune.report({"iteration": iteration, "compared": metrics[metric]})

    attempt = partial(
        run_trial,
        trajectory,
        make_backend(execution, store),
        store,
        RemoteReport(board),
        coordinator,
        on_iteration if metric else None,
        execution.overlap_evaluation,
    )
    failure = _with_retries(attempt)
    tune.report({"failure": failure or "", "ended": True})


def _with_retries(attempt: Callable[[], str | None]) -> str | None:
    """Run a trajectory, again after a growing pause when a process or machine of a stage was lost."""
    for tries in range(LOST_TRIAL_RETRIES):
        try:
            return attempt()
        except RayError as lost:
            pause_s = backoff_s(tries)
            log.warning("something was lost (%s); trying again in %.0f s", last_line(lost), pause_s)
            time.sleep(pause_s)
    return attempt()


def run_trial(
    trajectory: TrajectoryPlan,
    backend: Backend,
    store: Store,
    report: Report,
    coordinator: CoordinatorClient,
    on_iteration: OnIteration | None = None,
    overlap: bool = False,
) -> str | None:
    """Run one trajectory; return the reason if it failed in a way that trying again cannot mend."""
    # Of an evaluation in parts, the store tells which parts there are.
    stages_total = len(planned_stages(trajectory, store if trajectory.former_evaluations else None))
    resolver = ComputeResolver(trajectory, store, backend, report, Leases(coordinator), stages_total)
    try:
        run_trajectory(trajectory, StageRunner(trajectory, resolver, on_iteration, overlap))
    except LimitReachedError as limit:
        log.warning("%s ends at iteration %d: %s", trajectory.id, resolver.progress.iteration, limit)
        report(replace(resolver.progress, stage="ended early", finished=True))
        return None
    except RayError:
        raise  # lost, and so worth another try
    except Exception as error:
        expected = isinstance(error, IterabreError)
        shown = error if expected else unexpected(error)
        where = f"; the traceback is in {store.logs_dir}" if isinstance(shown, UnexpectedError) else ""
        reason = f"{shown}{where}"
        log.error("%s failed: %s", trajectory.id, reason, exc_info=not expected)
        report(replace(resolver.progress, stage="failed", finished=True))
        write_status(store, trajectory.id, TrajectoryStatus("failed", reason))
        coordinator.fail(trajectory.id)
        return reason
    report(replace(resolver.progress, finished=True))
    write_status(store, trajectory.id, TrajectoryStatus("done"))
    return None
