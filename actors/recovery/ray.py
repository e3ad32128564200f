"""Recovery on the cluster: the plain training loop inside Ray Train workers."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ray import train as ray_train
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from actors.artifacts import explained, join
from actors.contracts import Progress, RecoveryResult, RecoverySpec, no_progress
from actors.errors import ChangedError, IterabreError, RequestError, WorkError, last_line
from actors.recovery.training.train_context import CHECKPOINTS_TO_KEEP, TrainContext, WriteShard
from actors.stage_output import RunningStage, output_of, running_stage

START_TIMEOUT_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


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
    start_timeout_s: float = 600.0,
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
        workers: number of workers; `cpus_per_worker` and `gpus_per_worker` are
            what each one reserves.
        start_timeout_s: how long to wait for the workers' resources, each time
            that they are requested.
        max_failures: how many failures of workers, and of starting them, are survived;
            a machine that is taken away after a warning (spot) does not count.
        progress_handle: a picklable `Progress`; called in the worker of rank 0.

    Raises:
        RequestError: the request was wrong; found by the workers, not tried again.
        WorkError: training failed; names the cause, not the actor that it ended.
    """
    micro_batch_hint_uri = join(storage_path, name, "micro_batch_size")
    job = _Job(spec, adapter_uri, micro_batch_hint_uri, progress_handle or no_progress, running_stage())
    scaling = ScalingConfig(
        num_workers=workers,
        use_gpu=gpus_per_worker > 0,
        resources_per_worker={
            "CPU": cpus_per_worker,
            **({"GPU": gpus_per_worker} if gpus_per_worker else {}),
        },
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
    )
    with _start_timeout(start_timeout_s):
        return _fit(job, scaling, run_config)


def _fit(job: _Job, scaling: ScalingConfig, run_config: RunConfig) -> RecoveryResult:
    """Run the job to its end; failures are raised as what caused them."""
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _train_worker, train_loop_config={"job": job}, scaling_config=scaling, run_config=run_config
    )
    try:
        returned = trainer.fit().return_value
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
    return returned


def _train_worker(config: dict[str, _Job]) -> RecoveryResult | IterabreError:
    """Train in one worker. Errors that a retry would meet again are returned: Ray retries what is raised."""
    from actors.recovery.training.train_loop import DivergenceError, train

    job, ray_context = config["job"], ray_train.get_context()
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
        with output_of(job.stage):
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
def _start_timeout(seconds: float) -> Iterator[None]:
    """Set the limit where Ray Train reads it: in the environment of the process that calls `fit`."""
    before = os.environ.get(START_TIMEOUT_VARIABLE)
    os.environ[START_TIMEOUT_VARIABLE] = str(seconds)
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
