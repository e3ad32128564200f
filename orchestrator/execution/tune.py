"""A trial: one trajectory of a campaign, followed to its end in a process of its own.

It waits for its stages and computes nothing, so nothing that computes is imported here:
on the head there is such a process for every trajectory that is under way.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError

from orchestrator.config import ExecutionConfig
from orchestrator.errors import IterabreError, UnexpectedError, unexpected, unknown_name
from orchestrator.execution.progress import RemoteReport, Report
from orchestrator.execution.stage_runner import Backend, OnIteration, StoredStages
from orchestrator.execution.trajectory import run_trajectory
from orchestrator.planning.plan import CampaignPlan, TrajectoryPlan
from orchestrator.scheduling.coordinator import AskedClaims, LimitReachedError
from orchestrator.scheduling.limits import backoff_s
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import TrajectoryOutcome, write_outcome

log = logging.getLogger(__name__)

LOST_TRIAL_RETRIES = 3
"""How often a lost trial, or a trajectory that lost the machine of a stage, is tried again."""

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"

MakeBackend = Callable[[ExecutionConfig, Store], Backend]


def trial(
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

    attempt = partial(
        follow,
        trajectory,
        make_backend(execution, store),
        store,
        RemoteReport(board),
        call,
        on_iteration if metric else None,
        overlap,
    )
    failure = _despite_losses(attempt)
    tune.report({"failure": failure or "", "ended": True})


def _despite_losses(attempt: Callable[[], str | None]) -> str | None:
    """Follow a trajectory, again after a growing pause when a process or machine of a stage was lost."""
    for tries in range(LOST_TRIAL_RETRIES):
        try:
            return attempt()
        except RayError as lost:
            pause_s = backoff_s(tries)
            log.warning("something was lost (%s); trying again in %.0f s", last_line(lost), pause_s)
            time.sleep(pause_s)
    return attempt()


def last_line(error: BaseException) -> str:
    """What went wrong, without the trace of the processes it went through; the logs have that."""
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def follow(
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
    except RayError:
        raise  # lost, and so worth another try
    except Exception as error:
        meant = isinstance(error, IterabreError)
        told = error if meant else unexpected(error)
        where = f"; the traceback is in {store.logs_dir}" if isinstance(told, UnexpectedError) else ""
        reason = f"{told}{where}"
        log.error("%s failed: %s", trajectory.id, reason, exc_info=not meant)
        report(replace(stages.activity, stage="failed", finished=True))
        write_outcome(store, trajectory.id, TrajectoryOutcome("failed", reason))
        call("fail", trajectory.id)
        return reason
    report(replace(stages.activity, finished=True))
    write_outcome(store, trajectory.id, TrajectoryOutcome("done"))
    return None
