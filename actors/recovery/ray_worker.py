"""One Ray Train worker of a recovery: the plain training loop, with checkpoints by Ray Train."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ray import train as ray_train
from ray.train.v2._internal.execution import context

from actors.artifacts import explained
from actors.contracts import ClusterProgress, RecoveryResult, RecoverySpec
from actors.errors import ChangedError, IterabreError, RequestError, StopRequestedError
from actors.ray_pool import here
from actors.recovery.training.failures import DivergenceError
from actors.recovery.training.train_context import TrainContext, WriteShard
from actors.stage_output import RunningStage, output_of, quiet_libraries

_waited = {"s": 0.0}
"""In a worker: for how long the workers of its training had no place, so far."""


@dataclass(frozen=True)
class RecoveryJob:
    """What all workers of a training are told."""

    spec: RecoverySpec
    adapter_uri: str
    micro_batch_hint_uri: str
    progress: ClusterProgress
    workers: int
    collective_timeout_s: int = 1800
    stage: RunningStage | None = None


def note_place(waited_s: float) -> str:
    """Keep in a worker for how long it was waited; return where it is."""
    _waited["s"] = waited_s
    return here()


def train_worker(config: dict[str, RecoveryJob]) -> tuple[RecoveryResult | IterabreError, float]:
    """Train in one worker; return the result, and for how long its workers waited for their places."""
    quiet_libraries()
    # It reports every checkpoint, under the name of its file.
    logging.getLogger(context.__file__).setLevel(logging.WARNING)
    with output_of(config["job"].stage):
        return _train(config["job"]), _waited["s"]


def _train(job: RecoveryJob) -> RecoveryResult | IterabreError:
    """Train in one worker; errors that all workers meet at once are returned."""
    from actors.recovery.training.train_loop import train

    ray_context = ray_train.get_context()
    world_size = ray_context.get_world_size()

    def progress(done: int, total: int, note: str = "") -> None:
        fewer = "" if world_size == job.workers else f", on {world_size} of {job.workers} workers"
        job.progress(done, total, f"{note}{fewer}")

    own_context = TrainContext(
        rank=ray_context.get_world_rank(),
        world_size=world_size,
        adapter_uri=job.adapter_uri,
        micro_batch_hint_uri=job.micro_batch_hint_uri,
        save_checkpoint=_report_checkpoint,
        checkpoints=_checkpoints_newest_first,
        progress=progress,
        # The same on all workers: true once the machine of any of them is announced to be taken away.
        preemption_requested=lambda: ray_train.get_preemption_info() is not None,
        stop_requested=job.progress.stop_requested,
    )
    try:
        return train(job.spec, own_context)
    except (RequestError, ChangedError, DivergenceError, StopRequestedError) as error:
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
