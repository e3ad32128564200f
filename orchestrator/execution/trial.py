"""One trajectory to its end, whatever is lost meanwhile."""

import logging
import time
from dataclasses import replace

from actors.errors import DamagedArtifactError, StopRequestedError, StorageUnavailableError, last_line
from actors.out_of_memory import is_out_of_memory
from actors.ray_pool import cause_of, is_loss
from orchestrator.errors import IterabreError, MemoryExhaustedError, UnexpectedError, WorkError, unexpected
from orchestrator.execution.dry_run import planned_stages
from orchestrator.execution.progress import Report, TrajectoryProgress
from orchestrator.execution.resolvers import ComputeResolver
from orchestrator.execution.stage_kinds import Backend
from orchestrator.execution.stage_runner import OnIteration, StageRunner
from orchestrator.execution.trajectory import run_trajectory
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.scheduling.coordinator import CoordinatorClient
from orchestrator.scheduling.leases import Leases, LimitReachedError, TrajectoryCancelledError
from orchestrator.scheduling.limits import backoff_s
from orchestrator.storage.layout import stage_log
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import TrajectoryStatus, write_status

log = logging.getLogger(__name__)

LOST_TRIAL_RETRIES = 3
"""How often a lost trial is tried again, and a trajectory that lost the machine of a stage, or the storage,
and has finished no stage since."""

MOST_QUARANTINES = 3
"""How often a trajectory goes on after a damaged artifact was quarantined."""


def run_trial(
    trajectory: TrajectoryPlan,
    backend: Backend,
    store: Store,
    report: Report,
    coordinator: CoordinatorClient,
    on_iteration: OnIteration | None = None,
    overlap: bool = False,
) -> str | None:
    """Run one trajectory; return the reason if it failed in a way that trying again cannot mend.

    What was lost, and storage that was away, is tried again after a growing pause; a damaged artifact is
    quarantined, so that its stage is computed anew. Any other exception ends the trajectory.
    """
    # Of an evaluation in parts, the store tells which parts there are.
    stages_total = len(planned_stages(trajectory, store if trajectory.former_evaluations else None))
    tries = quarantined = reached = 0
    while True:
        leases = Leases(coordinator, trajectory.id)
        resolver = ComputeResolver(trajectory, store, backend, report, leases, stages_total)
        stages = StageRunner(trajectory, resolver, on_iteration, overlap)
        try:
            if coordinator.is_cancelled(trajectory.id):
                raise TrajectoryCancelledError(f"{trajectory.id} was cancelled")
            run_trajectory(trajectory, stages)
        except TrajectoryCancelledError:
            end_cancelled(trajectory, store, report)
            return None
        except (LimitReachedError, StopRequestedError) as limit:
            log.warning("%s ends at iteration %d: %s", trajectory.id, resolver.progress.iteration, limit)
            report(replace(resolver.progress, stage="ended early", finished=True, note=str(limit)))
            return None
        except DamagedArtifactError as damaged:
            if quarantined == MOST_QUARANTINES or not store.quarantine_artifact(damaged.uri):
                return _failed(trajectory, damaged, resolver.progress, store, report, coordinator)
            quarantined += 1
            log.warning("%s: %s; its stage is quarantined and computed anew", trajectory.id, damaged)
        except Exception as error:
            if resolver.progress.stages_done > reached:  # it has got on since the last loss
                tries, reached = 0, resolver.progress.stages_done
            if tries == LOST_TRIAL_RETRIES or not (
                is_loss(error) or isinstance(cause_of(error), StorageUnavailableError)
            ):
                return _failed(trajectory, error, resolver.progress, store, report, coordinator)
            pause_s = backoff_s(tries)
            tries += 1
            said = f"{last_line(error)}; restarted in {pause_s:.0f} s, try {tries} of {LOST_TRIAL_RETRIES}"
            log.warning("%s: %s", trajectory.id, said)
            report(replace(resolver.progress, waits_for=said))
            time.sleep(pause_s)
        else:
            report(replace(resolver.progress, finished=True))
            write_status(store, trajectory.id, TrajectoryStatus("done"))
            return None
        finally:
            stages.close()


def end_cancelled(trajectory: TrajectoryPlan, store: Store, report: Report) -> None:
    """Record that an operator ended the trajectory."""
    log.warning("%s was cancelled", trajectory.id)
    iterations = len(trajectory.iterations)
    report(TrajectoryProgress(trajectory.id, 0, iterations, "cancelled", finished=True))
    reason = f"by an operator; `iterabre continue RUN --trajectory {trajectory.id}`, then --resume, goes on"
    write_status(store, trajectory.id, TrajectoryStatus("cancelled", reason))


def _failed(
    trajectory: TrajectoryPlan,
    error: Exception,
    progress: TrajectoryProgress,
    store: Store,
    report: Report,
    coordinator: CoordinatorClient,
) -> str:
    """Record that a trajectory has failed for good, and return why."""
    shown = as_shown(error)
    where = f"; the traceback is in {store.logs_dir}" if isinstance(shown, UnexpectedError) else ""
    reason = f"{shown}{where}"
    log.error("%s failed: %s", trajectory.id, reason, exc_info=error if shown is not error else None)
    report(replace(progress, stage="failed", finished=True, note=reason))
    at = stage_log(trajectory.id, progress.iteration, progress.stage, progress.key) if progress.key else ""
    write_status(store, trajectory.id, TrajectoryStatus("failed", reason, at))
    coordinator.fail(trajectory.id)
    return reason


def as_shown(error: Exception) -> IterabreError:
    """Return the error as it is shown to the user."""
    cause = cause_of(error)
    if isinstance(cause, IterabreError):
        return cause
    if is_loss(cause):
        return WorkError(f"{last_line(cause)}; lost {LOST_TRIAL_RETRIES + 1} times; --resume continues")
    if is_out_of_memory(cause):
        return MemoryExhaustedError(
            f"{last_line(cause)}: memory does not suffice; let fewer actors share a node"
        )
    return unexpected(cause)
