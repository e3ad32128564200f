"""Recovery on the cluster: the plain training loop inside Ray Train workers."""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ray import train as ray_train
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext
from ray.util import placement_group_table

from actors.artifacts import explained, join
from actors.contracts import (
    ClusterProgress,
    Progress,
    RecoveryResult,
    RecoverySpec,
    no_progress,
    on_cluster,
)
from actors.errors import ChangedError, IterabreError, RequestError, WorkError, last_line
from actors.ray_pool import here, reporting_wait
from actors.recovery.training.train_context import CHECKPOINTS_TO_KEEP, TrainContext, WriteShard
from actors.stage_output import RunningStage, output_of, running_stage

START_TIMEOUT_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

NEVER_S = 1e8
"""Three years: Ray Train knows no wait without an end."""


_waited = {"s": 0.0}
"""In a worker: for how long the workers of its training had no place, so far."""


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
        self._progress.runs_on(worker_group.execute(_note_place, self._waited_s))


def _note_place(waited_s: float) -> str:
    """Keep in a worker for how long it was waited; return where it is."""
    _waited["s"] = waited_s
    return here()


def _needs(scaling: ScalingConfig) -> str:
    """Return what the workers need, in words."""
    unit = "GPU" if scaling.use_gpu else "CPU"
    each = (scaling.resources_per_worker or {}).get(unit, 0)
    return f"{scaling.num_workers} x {each:g} {scaling.accelerator_type or ''} {unit}".replace("  ", " ")


@dataclass(frozen=True)
class _Job:
    spec: RecoverySpec
    adapter_uri: str
    micro_batch_hint_uri: str
    progress: Progress
    stage: RunningStage | None


def recover_on_ray(
    spec: RecoverySpec,
    *,
    adapter_uri: str,
    name: str,
    storage_path: str,
    workers: int = 1,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    memory_bytes_per_worker: float = 0.0,
    accelerator: str | None = None,
    labels: Mapping[str, str] | None = None,
    start_timeout_s: float | None = None,
    max_failures: int = 3,
    progress_handle: Progress | None = None,
) -> RecoveryResult:
    """Run recovery as a Ray Train job and wait for it.

    The loss curve is that of `recover_locally`, whatever the number of workers.
    Lost workers are replaced and training continues from the last checkpoint, as it
    does if a new caller uses the same `name`, even with another number of workers.

    Args:
        spec: what to train.
        adapter_uri: where rank 0 publishes the trained adapter.
        name: name of the run, unique to `spec` under `storage_path`.
        storage_path: where checkpoints go; all nodes must see it.
        workers: number of workers; `cpus_per_worker`, `gpus_per_worker` and
            `memory_bytes_per_worker` are what each one reserves, of nodes with GPUs of the
            type `accelerator` and with those `labels`.
        start_timeout_s: how long to wait for the workers' resources, each time
            that they are requested; until there is room if None.
        max_failures: how many failures of workers, and of starting them, are survived;
            a machine that is taken away after a warning (spot) does not count.
        progress_handle: a picklable `Progress`; called in the worker of rank 0.

    Raises:
        RequestError: the request was wrong; found by the workers, not tried again.
        WorkError: training failed; names the cause, not the actor that it ended.
    """
    micro_batch_hint_uri = join(storage_path, name, "micro_batch_size")
    progress = on_cluster(progress_handle or no_progress)
    job = _Job(spec, adapter_uri, micro_batch_hint_uri, progress, running_stage())
    scaling = ScalingConfig(
        num_workers=workers,
        use_gpu=gpus_per_worker > 0,
        resources_per_worker={
            "CPU": cpus_per_worker,
            **({"GPU": gpus_per_worker} if gpus_per_worker else {}),
            **({"memory": memory_bytes_per_worker} if memory_bytes_per_worker else {}),
        },
        accelerator_type=accelerator,
        label_selector=dict(labels) if labels else None,
    )
    run_config = RunConfig(
        name=name,
        storage_path=storage_path,
        failure_config=FailureConfig(
            max_failures=max_failures,
            controller_failure_limit=max_failures,
            # Losing a machine that was announced to go is no failure; as many as come are survived.
            max_preemption_failures=-1,
        ),
        checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_TO_KEEP),
        logging_config=LoggingConfig(log_level="WARNING"),
        callbacks=[WorkerPlaces(progress, _needs(scaling))],
    )
    with _start_timeout(start_timeout_s):
        result, waited_s = _fit(job, scaling, run_config)
    progress.waited(waited_s)
    return result


def _fit(job: _Job, scaling: ScalingConfig, run_config: RunConfig) -> tuple[RecoveryResult, float]:
    """Run the job to its end; failures are raised as what caused them. Return for how long it waited, too."""
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _train_worker, train_loop_config={"job": job}, scaling_config=scaling, run_config=run_config
    )
    try:
        returned, waited_s = trainer.fit().return_value
    except ray_train.WorkerGroupError as error:
        # One worker's own error, which caused the others, rather than a lost peer.
        causes = {rank: getattr(e, "_base_exc", e) for rank, e in sorted(error.worker_failures.items())}
        rank, cause = min(causes.items(), key=lambda item: _failure_rank(item[1]))
        if isinstance(cause, IterabreError):
            raise cause from error
        raise WorkError(
            f"recovery {run_config.name!r} failed on worker {rank}: {type(cause).__name__}: "
            f"{last_line(cause)}. Finished steps are kept up to the last checkpoint; continue with --resume"
        ) from error
    except ray_train.TrainingFailedError as error:
        raise WorkError(
            f"recovery {run_config.name!r} could not run on {scaling.num_workers} workers of "
            f"{scaling.resources_per_worker}: {last_line(error)}"
        ) from error
    if isinstance(returned, IterabreError):
        raise returned
    return returned, waited_s


def _train_worker(config: dict[str, _Job]) -> tuple[RecoveryResult | IterabreError, float]:
    """Train in one worker; return the result, and for how long its workers waited for their places."""
    with output_of(config["job"].stage):
        return _train(config["job"]), _waited["s"]


def _train(job: _Job) -> RecoveryResult | IterabreError:
    """Train in one worker. Errors that a retry would meet again are returned: Ray retries what is raised."""
    from actors.recovery.training.train_loop import DivergenceError, train

    ray_context = ray_train.get_context()
    context = TrainContext(
        rank=ray_context.get_world_rank(),
        world_size=ray_context.get_world_size(),
        adapter_uri=job.adapter_uri,
        micro_batch_hint_uri=job.micro_batch_hint_uri,
        save_checkpoint=_report_checkpoint,
        checkpoints=_checkpoints_newest_first,
        progress=job.progress,
        # The same on all workers: true once the machine of any of them is announced to be taken away.
        preemption_requested=lambda: ray_train.get_preemption_info() is not None,
    )
    try:
        return train(job.spec, context)
    except (RequestError, ChangedError, DivergenceError) as error:
        return error


def _report_checkpoint(steps_done: int, write: WriteShard) -> None:
    """Write this worker's shard; Ray Train merges the shards and commits when all are there."""
    with TemporaryDirectory(prefix="iterabre-checkpoint-") as scratch:
        write(Path(scratch))
        with explained(ray_train.get_context().get_experiment_name(), "store a checkpoint of recovery"):
            ray_train.report(
                {"steps_done": steps_done},
                checkpoint=ray_train.Checkpoint.from_directory(scratch),
                checkpoint_dir_name=f"step_{steps_done:06d}",
            )


def _checkpoints_newest_first() -> Iterator[AbstractContextManager[Path]]:
    """Return what Ray Train has committed: checkpoints of which every worker's shard has arrived."""
    reported = ray_train.get_all_reported_checkpoints()
    return (_open_checkpoint(each.checkpoint) for each in reversed(reported))


@contextmanager
def _open_checkpoint(checkpoint: ray_train.Checkpoint) -> Iterator[Path]:
    with checkpoint.as_directory() as directory:
        yield Path(directory)


@contextmanager
def _start_timeout(seconds: float | None) -> Iterator[None]:
    """Set the limit where Ray Train reads it: in the environment of the process that calls `fit`."""
    before = os.environ.get(START_TIMEOUT_VARIABLE)
    os.environ[START_TIMEOUT_VARIABLE] = str(NEVER_S if seconds is None else seconds)
    try:
        yield
    finally:
        if before is None:
            del os.environ[START_TIMEOUT_VARIABLE]
        else:
            os.environ[START_TIMEOUT_VARIABLE] = before


def _failure_rank(cause: BaseException) -> int:
    """Return an error's distance from the root cause: own error, own crash, lost process, lost peer."""
    if isinstance(cause, IterabreError):
        return 0
    if isinstance(cause, RayActorError):
        return 2
    return 3 if "peer" in str(cause).lower() else 1
