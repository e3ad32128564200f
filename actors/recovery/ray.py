"""Recovery on the cluster: a Ray Train job, and what becomes of it when workers are lost."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from ray import train as ray_train
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.exceptions import (
    CollectiveTimeoutError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import RayTrainCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext
from ray.util import placement_group_table

from actors.artifacts import join, read_bytes, retrying_filesystem, write_bytes
from actors.contracts import (
    ActorPoolSpec,
    ClusterProgress,
    Progress,
    RecoveryResult,
    RecoverySpec,
    no_progress,
    on_cluster,
)
from actors.errors import (
    FAULT,
    IterabreError,
    MemoryExhaustedError,
    UnexpectedError,
    WorkError,
    last_line,
)
from actors.out_of_memory import is_out_of_memory
from actors.ray_pool import cause_of, is_loss, reporting_wait
from actors.recovery.ray_worker import RecoveryJob, note_place, train_worker
from actors.recovery.training.failures import (
    MicroBatchError,
    Restarts,
    is_lost_peer,
    worker_counts,
)
from actors.recovery.training.train_context import (
    CHECKPOINTS_TO_KEEP,
    MemoryUse,
)
from actors.stage_output import running_stage

START_TIMEOUT_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

POLL_VARIABLE = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
POLL_S = 0.5
"""How often the controller looks at its workers: it takes one checkpoint of theirs at a time, and then their
end, so that Ray Train's own 2 s would be waited for several times at the end of every training."""

HANGS = (WorkerHealthCheckTimeoutError, CollectiveTimeoutError, ray_train.WorkerGroupError)
"""What Ray Train raises when workers do not answer, or not one another; the last one if it gives no cause."""

NEVER_S = 1e8
"""Three years: Ray Train knows no wait without an end."""

log = logging.getLogger(__name__)


class WorkerPlaces(WorkerGroupCallback):
    """Reports what the workers wait for and where they are; runs in the controller of the training.

    Ray Train calls it each time that it starts the workers, at first and after a loss.
    """

    def __init__(self, progress: ClusterProgress, needs: str):
        self._progress, self._needs = progress, needs
        self._waited_s = 0.0
        self._waiting: ExitStack | None = None

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        """Begin to report what the workers wait for."""
        if self._waiting is not None:  # the last start failed
            self._waiting.close()
        unit = "GPU" if "GPU" in worker_group_context.resources_per_worker else "CPU"
        self._waiting = ExitStack()
        self._waiting.enter_context(reporting_wait(self._progress, self._needs, unit))

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Report the places, and give the workers the time that was waited for them."""
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self._waited_s += placement_group_table(group)["stats"]["end_to_end_creation_latency_ms"] / 1e3
        self._progress.runs_on(worker_group.execute(note_place, self._waited_s))


def _needs(scaling: ScalingConfig) -> str:
    """Return what the workers need, in words."""
    unit = "GPU" if scaling.use_gpu else "CPU"
    each = (scaling.resources_per_worker or {}).get(unit, 0)
    return f"{scaling.num_workers} x {each:g} {scaling.accelerator_type or ''} {unit}".replace("  ", " ")


def recover_on_ray(
    spec: RecoverySpec,
    *,
    adapter_uri: str,
    name: str,
    storage_path: str,
    pool: ActorPoolSpec,
    replacement_timeout_s: float | None = None,
    max_failures: int = 3,
    collective_timeout_s: int = 1800,
    progress_handle: Progress | None = None,
) -> RecoveryResult:
    """Run recovery as a Ray Train job and wait for it.

    The loss curve is that of `recover_locally`, whatever the number of workers.
    Lost workers are replaced, or if there is no room for that go on without them, and training
    continues from the last checkpoint, as it does if a new caller uses the same `name`. Nothing but a
    loss of workers is tried again.

    Args:
        spec: what to train.
        adapter_uri: where rank 0 publishes the trained adapter.
        name: name of the run, unique to `spec` under `storage_path`.
        storage_path: where checkpoints go; all nodes must see it.
        pool: how many workers, what each reserves, and how long to wait for that, each time that they
            are started.
        replacement_timeout_s: how long to wait for the replacement of a lost worker before
            training goes on with fewer; until there is one if None.
        max_failures: how many failures of workers, and of starting them, are survived;
            a machine that is taken away after a warning (spot) does not count.
        collective_timeout_s: how long an exchange between workers may take before it counts as lost.
        progress_handle: a picklable `Progress`; called in the worker of rank 0.

    Raises:
        RequestError: the request was wrong; found by the workers.
        StopRequestedError: the progress asked to stop; the same `name` goes on.
        MemoryExhaustedError: memory does not suffice, with the smallest micro-batch neither.
        WorkError: training failed; names the cause, not the actor that it ended.
    """
    progress = on_cluster(progress_handle or no_progress)
    hint_uri = join(storage_path, name, "micro_batch_size")
    job = RecoveryJob(
        spec, adapter_uri, hint_uri, progress, pool.actors, collective_timeout_s, running_stage()
    )
    scaling = _scaling(pool)
    filesystem, path = retrying_filesystem(storage_path)
    run_config = RunConfig(
        name=name,
        storage_path=path,
        storage_filesystem=filesystem,
        # Ray Train would try again whatever failed, and only with as many workers.
        failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_TO_KEEP),
        # Its warnings are of requests that it repeats by itself.
        logging_config=LoggingConfig(log_level="ERROR"),
    )
    counts = worker_counts(spec.batch_size, pool.actors)
    restarts = Restarts(counts, max_failures, pool.start_timeout_s, replacement_timeout_s)
    while True:
        try:
            result, waited_s = _fit(job, replace(scaling, num_workers=restarts.count), run_config, restarts)
        except MicroBatchError as error:
            log.warning("%s", error)
        except _WorkersLostError as lost:
            if not restarts.go_on_after_loss(lost.announced):
                raise WorkError(
                    f"recovery {name!r} lost workers {restarts.failures} times "
                    f"(execution.training.max_failures: {max_failures}): {lost}. Finished steps are kept up "
                    "to the last checkpoint; continue with --resume"
                ) from lost
            tries = "as announced" if lost.announced else f"try {restarts.failures} of {max_failures}"
            log.warning("recovery %s: %s; restarted from its last checkpoint, %s", name, lost, tries)
            progress.restarted(f"lost a worker; restarted, {tries}")
        except _NoPlacesError as error:
            if not restarts.go_on_without_places():
                raise
            said = f"{error}: going on with {restarts.count} of {pool.actors} workers"
            log.warning("recovery %s: %s", name, said)
            progress.waits_for(said)
        else:
            progress.waited(waited_s + restarts.missing_s)
            return result


def _scaling(pool: ActorPoolSpec) -> ScalingConfig:
    """Return what Ray Train calls the places of workers."""
    each = {"CPU": pool.cpus, "GPU": pool.gpus, "memory": pool.memory_bytes}
    return ScalingConfig(
        num_workers=pool.actors,
        use_gpu=pool.gpus > 0,
        resources_per_worker={name: amount for name, amount in each.items() if amount or name == "CPU"},
        accelerator_type=pool.accelerator,
        label_selector=dict(pool.labels) or None,
    )


class _WorkersLostError(WorkError):
    """Processes or machines of workers were lost; `announced` if all of them were to be taken away."""

    def __init__(self, message: str, announced: bool = False):
        super().__init__(message)
        self.announced = announced


class _NoPlacesError(WorkError):
    """The workers were not placed in time."""


def _fit(
    job: RecoveryJob, scaling: ScalingConfig, run_config: RunConfig, restarts: Restarts
) -> tuple[RecoveryResult, float]:
    """Run the job to its end; failures are raised as what caused them. Return for how long it waited, too."""
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback

    class Trainer(TorchTrainer):
        """A trainer that starts no process for Ray datasets, of which there are none."""

        def _create_default_callbacks(self) -> list[RayTrainCallback]:
            callbacks = super()._create_default_callbacks()
            return [each for each in callbacks if not isinstance(each, DatasetsCallback)]

    trainer = Trainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=job.collective_timeout_s),
        scaling_config=scaling,
        run_config=replace(run_config, callbacks=[WorkerPlaces(job.progress, _needs(scaling))]),
    )
    try:
        timeout_s = NEVER_S if restarts.timeout_s is None else restarts.timeout_s
        with _environment({START_TIMEOUT_VARIABLE: str(timeout_s), POLL_VARIABLE: str(POLL_S)}):
            returned, waited_s = trainer.fit().return_value
    except ray_train.PreemptionError as error:
        raise _WorkersLostError(last_line(error), announced=True) from error
    except ray_train.WorkerGroupError as error:
        causes = [_error_of_worker(each) for _, each in sorted(error.worker_failures.items())]
        raise _cause_of_failure(job, str(run_config.name), causes or [error]) from error
    except ray_train.ControllerError as error:
        failure = error.controller_failure
        if isinstance(failure, WorkerGroupStartupTimeoutError):
            raise _NoPlacesError(
                f"recovery {run_config.name!r} got no {_needs(scaling)} within {restarts.timeout_s:g} s"
            ) from error
        if isinstance(failure, WorkerGroupStartupFailedError):
            raise _WorkersLostError(f"the workers did not start: {last_line(failure)}") from error
        raise WorkError(
            f"recovery {run_config.name!r} could not run on {scaling.num_workers} workers of "
            f"{scaling.resources_per_worker}: {last_line(error)}"
        ) from error
    if isinstance(returned, IterabreError):
        raise returned
    return returned, waited_s


def _error_of_worker(error: BaseException) -> BaseException:
    """Return what a worker raised, or what Ray says of its end, without Ray Train's wrappers."""
    for wrapped in ("_base_exc", "health_check_failure"):
        error = getattr(error, wrapped, error)
    return cause_of(error)


def _cause_of_failure(job: RecoveryJob, name: str, causes: Sequence[BaseException]) -> IterabreError:
    """Return what is to be raised for the failures of workers: one's own error rather than a lost peer."""
    for cause in causes:
        if isinstance(cause, IterabreError):
            return cause
    if any(map(is_out_of_memory, causes)):
        return _with_smaller_micro_batch(job, name, next(filter(is_out_of_memory, causes)))
    if (lost := [cause for cause in causes if is_loss(cause)]) or all(map(_only_waited, causes)):
        announced = bool(lost) and all(getattr(cause, "preempted", False) for cause in lost)
        return _WorkersLostError(last_line([*lost, *causes][0]).partition(". ")[0], announced)
    own = next(cause for cause in causes if not _only_waited(cause))
    return UnexpectedError(
        f"recovery {name!r} failed: {type(own).__name__}: {last_line(own)}: {FAULT}. Finished steps are kept "
        "up to the last checkpoint"
    )


def _only_waited(cause: BaseException) -> bool:
    """Return whether a worker failed because another did not answer, or hung itself."""
    return is_lost_peer(cause) or isinstance(cause, HANGS)


def _with_smaller_micro_batch(job: RecoveryJob, name: str, error: BaseException) -> IterabreError:
    """Note a smaller micro-batch where a worker was ended for want of memory, or failed outside of a step."""
    noted = read_bytes(job.micro_batch_hint_uri)
    use = MemoryUse.parse(noted.decode()) if noted else MemoryUse(job.spec.micro_batch_size)
    smaller = use.smaller(auto=job.spec.gradient_checkpointing == "auto")
    if smaller is None:
        return MemoryExhaustedError(
            f"recovery {name!r}: memory does not suffice even with micro-batches of one sequence "
            f"({last_line(error)}); make recovery.sequence_length smaller, set "
            "recovery.gradient_checkpointing, shard or offload (configs/deepspeed/zero3_offload.json), or "
            "use a device with more memory"
        )
    write_bytes(job.micro_batch_hint_uri, str(smaller).encode())
    size, again = smaller.micro_batch_size, ""
    if smaller.checkpointed:
        again = f" and {smaller.checkpointed:.0%} of the blocks computed again"
    return MicroBatchError(
        f"recovery {name}: {last_line(error)}; going on with micro-batches of {size}{again}"
    )


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables where Ray Train reads its settings: in the environment of what calls `fit`."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
