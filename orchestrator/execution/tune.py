"""Trajectories as trials of Ray Tune, each followed to its end in a process of its own.

A trial waits for its stages and computes nothing, so nothing that computes is imported here:
on the head there is such a process for every trajectory that is under way.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.tune.trainable import wrap_function

from actors.artifacts import retrying_filesystem
from actors.errors import last_line
from actors.ray_pool import is_loss
from actors.stage_output import LOG_FORMAT, MarkingFormatter
from orchestrator.config import CampaignConfig, ExecutionConfig, SearchConfig
from orchestrator.errors import unknown_name
from orchestrator.execution.cluster import HEAD, QUIET
from orchestrator.execution.control import control_reader, watching_for_cancellation
from orchestrator.execution.dry_run import unfinished_trajectories
from orchestrator.execution.gauges import CampaignGauges
from orchestrator.execution.head_actors import start_board, start_coordinator
from orchestrator.execution.progress import RemoteReport, Report, TrajectoryProgress
from orchestrator.execution.ray import RayBackend
from orchestrator.execution.stage_kinds import Backend
from orchestrator.execution.stopping import StopRequest
from orchestrator.execution.trial import LOST_TRIAL_RETRIES, as_shown, end_cancelled, run_trial
from orchestrator.planning.plan import CampaignPlan
from orchestrator.reporting.data.overview import overview
from orchestrator.reporting.live_view import live_view
from orchestrator.scheduling.admission import AdmissionController
from orchestrator.scheduling.coordinator import CoordinatorClient
from orchestrator.scheduling.limits import Limits
from orchestrator.scheduling.search import Measured, measured_of, why_given_up
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.run_progress import progress_written
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import TrajectoryStatus, write_status

log = logging.getLogger(__name__)

TRIAL_RESOURCES = tune.PlacementGroupFactory([{HEAD: 0.001}])
"""A trial only waits for its stages: it takes no CPU, and runs on the head, never a spot machine."""

MakeBackend = Callable[[ExecutionConfig, Store], Backend]


@dataclass(frozen=True)
class CampaignOutcome:
    """How a campaign ended.

    `failures` has the reason of every trajectory that failed, `stopped` the trajectories that
    the scheduler gave up, `limit` the limit that ended the campaign early, `cancelled` the trajectories
    that an operator ended.
    """

    failures: Mapping[str, str]
    stopped: Sequence[str] = ()
    limit: str | None = None
    cancelled: Sequence[str] = ()


def run_trials(
    config: CampaignConfig,
    plan: CampaignPlan,
    store: Store,
    limits: Limits,
    at_a_time: int,
    admission: AdmissionController | None = None,
    make_backend: MakeBackend = RayBackend,
    stop: StopRequest | None = None,
) -> CampaignOutcome:
    """Run the trajectories as trials of Ray Tune, `at_a_time` of them, on the connected cluster.

    Stages wait for `admission`, if it is given; no more start once `stop` is requested. Trials begun again
    find their finished stages in the store, so Tune need not restore anything.
    """
    # It loads what computes; the process of a trial, which loads this module, does not need it.
    from orchestrator.planning.estimate import expected_seconds

    os.environ.update(QUIET)
    searching = config.search.scheduler != "none"
    asked = control_reader(config, plan, store)()
    trajectories = unfinished_trajectories(plan, store, asked, keep_ends=searching)
    if not trajectories:
        return CampaignOutcome({})
    stopper = LedgerStopper(config.search, plan, Ledger(store.ledger_uri)) if searching else None
    control = control_reader(config, plan, store)
    board = start_board(config.name)
    coordinator = start_coordinator(limits, admission, store, at_a_time, control, config.name)
    trainable = tune.with_parameters(
        trial,
        plan=plan,
        execution=config.execution,
        store=store,
        board=board,
        coordinator=coordinator,
        make_backend=make_backend,
        metric=config.search.metric if searching else None,
    )
    restarts = ReportRestarts(plan, RemoteReport(board), coordinator.is_cancelled)
    tuner = _tuner(trainable, list(trajectories), store, at_a_time, stopper, restarts)
    gauges = CampaignGauges(config.name)

    def snapshot() -> list[TrajectoryProgress]:
        shown: list[TrajectoryProgress] = ray.get(board.snapshot.remote())
        gauges.show(shown)
        return shown

    planned = {name: len(plan.find(name).iterations) for name in trajectories}
    whole = partial(overview, trajectories, expected_seconds(config, plan, trajectories), time.time())
    with (
        live_view(snapshot, planned, whole),
        progress_written(store, snapshot, overview=whole),
        stop.calls(coordinator.stop) if stop else nullcontext(),
    ):
        results = tuner.fit()
    coordinator.save_usage()
    return _campaign_outcome(results, store, coordinator, stopper.reasons if stopper else {})


def _tuner(
    trainable: Callable[[dict[str, Any]], None],
    trajectories: list[str],
    store: Store,
    at_a_time: int,
    stopper: tune.Stopper | None,
    restarts: tune.Callback,
) -> tune.Tuner:
    """Return a tuner with a trial for each trajectory, in their order."""
    filesystem, path = retrying_filesystem(store.tune_uri)
    trajectory = wrap_function(tune.with_resources(trainable, TRIAL_RESOURCES), name="Trajectory")
    trajectory.__name__ = trajectory.__qualname__ = "Trajectory"  # what Ray's dashboard shows
    return tune.Tuner(
        trajectory,
        param_space={"trajectory": tune.grid_search(trajectories)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_a_time,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["trajectory"],
        ),
        run_config=tune.RunConfig(
            name=f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            stop=stopper,
            callbacks=[restarts],
            failure_config=tune.FailureConfig(max_failures=LOST_TRIAL_RETRIES),
        ),
    )


def _campaign_outcome(
    results: tune.ResultGrid, store: Store, coordinator: CoordinatorClient, given_up: Mapping[str, str]
) -> CampaignOutcome:
    """Collect how the trials ended; those that reported no end of their own were given up or lost."""
    failures: dict[str, str] = {}
    stopped: list[str] = []
    cancelled: list[str] = []
    for result in results:
        trajectory, metrics = result.config["trajectory"], result.metrics or {}
        if metrics.get("cancelled") or (result.error and coordinator.is_cancelled(trajectory)):
            cancelled.append(trajectory)
        elif result.error:
            failures[trajectory] = last_line(result.error)
            write_status(store, trajectory, TrajectoryStatus("failed", failures[trajectory]))
        elif metrics.get("failure"):
            failures[trajectory] = metrics["failure"]
        elif not metrics.get("ended"):
            after = f"given up by the scheduler after iteration {metrics.get('iteration')}"
            reason = f"{after}: {given_up[trajectory]}" if trajectory in given_up else after
            write_status(store, trajectory, TrajectoryStatus("stopped", reason))
            stopped.append(trajectory)
    return CampaignOutcome(failures, tuple(stopped), coordinator.ended_by(), tuple(cancelled))


class ReportRestarts(tune.Callback):
    """Reports trajectories whose trial was lost, and is started again by Tune."""

    def __init__(self, plan: CampaignPlan, report: Report, is_cancelled: Callable[[str], bool]):
        self._plan, self._report, self._is_cancelled = plan, report, is_cancelled

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Report the restart of one trial."""
        trajectory = self._plan.find(trial.config["trajectory"])
        if self._is_cancelled(trajectory.id):
            return  # that ended its process
        said = f"lost its process; restarted, try {trial.num_failures} of {LOST_TRIAL_RETRIES}"
        log.warning("%s %s", trajectory.id, said)
        starting = TrajectoryProgress(trajectory.id, 0, len(trajectory.iterations), "start", key="start")
        self._report(replace(starting, started_at=time.time(), restarted=said))


class LedgerStopper(tune.Stopper):
    """Ends trials by the rule of a search, decided from the ledger alone; `reasons` says why each ended.

    A trial reports an iteration when its numbers are in the ledger.
    """

    def __init__(self, search: SearchConfig, plan: CampaignPlan, ledger: Ledger):
        self._search, self._ledger = search, ledger
        self._last = {trajectory.id: len(trajectory.iterations) for trajectory in plan.trajectories}
        self._read: set[str] = set()
        self._measured: list[Measured] = []
        self.reasons: dict[str, str] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        trajectory, iteration = result.get("trajectory"), result.get("iteration")
        if trajectory is None or iteration is None or iteration >= self._last[trajectory]:
            return False  # an end, or so near to it that nothing is saved
        new = sorted(set(self._ledger.parts()) - self._read)
        rows = self._ledger.read_parts(new).to_pylist()
        self._read.update(new)
        self._measured += [
            each for each in measured_of(rows, self._search.metric) if each.trajectory in self._last
        ]
        reason = why_given_up(self._search, self._measured, trajectory, iteration)
        if reason is not None:
            self.reasons[trajectory] = reason
        return reason is not None

    def stop_all(self) -> bool:
        return False


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
    handler = logging.StreamHandler()
    handler.setFormatter(MarkingFormatter(LOG_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    trajectory = plan.find(parameters["trajectory"])

    def on_iteration(iteration: int, metrics: Mapping[str, float]) -> None:
        assert metric is not None, "nothing is compared without a metric"
        if metric not in metrics:
            raise unknown_name("search.metric", metric, metrics)
        tune.report({"trajectory": trajectory.id, "iteration": iteration})

    if coordinator.stopping():
        tune.report({"failure": "", "ended": True})
        return

    def end() -> None:
        end_cancelled(trajectory, store, RemoteReport(board))
        # Tune starts the trial again, and that finds the trajectory cancelled.
        os._exit(0)

    is_cancelled, cancelled = partial(coordinator.is_cancelled, trajectory.id), False
    try:
        with watching_for_cancellation(is_cancelled, end):
            failure = run_trial(
                trajectory,
                make_backend(execution, store),
                store,
                RemoteReport(board),
                coordinator,
                on_iteration if metric else None,
                execution.overlap_evaluation,
            )
        cancelled = failure is None and is_cancelled()
    except Exception as error:
        if is_loss(error):
            raise  # of the coordinator: Tune begins the trial again
        log.exception("%s ends", trajectory.id)
        failure = str(as_shown(error))
    tune.report({"failure": failure or "", "ended": True, "cancelled": cancelled})
