"""Training workers as plain processes: what Ray Train does for recovery, without Ray."""

import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import distributed as dist
from torch import multiprocessing

from actors.contracts import Progress, RecoveryResult, RecoverySpec, no_progress
from actors.recovery.training.checkpoint import CheckpointDirectory
from actors.recovery.training.train_context import TrainContext, WriteShard
from actors.recovery.training.train_loop import train

Job = tuple[RecoverySpec, Path]
"""A request, and the directory that its checkpoints, its adapter and its result go to."""


def group_train_context(
    rank: int, world_size: int, directory: Path, progress: Progress = no_progress
) -> TrainContext:
    """Shared checkpoints that worker 0 puts in place once all shares are written."""
    checkpoints = CheckpointDirectory(directory / "checkpoints")

    def save(steps_done: int, write: WriteShard) -> None:
        scratch = directory / f"scratch-{steps_done}"
        scratch.mkdir(exist_ok=True, parents=True)
        write(scratch)
        dist.barrier()
        if rank == 0:
            checkpoints.save(steps_done, lambda place: [f.rename(place / f.name) for f in scratch.iterdir()])
        dist.barrier()

    return TrainContext(
        rank=rank,
        world_size=world_size,
        adapter_uri=str(directory / "adapter"),
        micro_batch_hint_uri=str(directory / "micro_batch_size"),
        save_checkpoint=save,
        checkpoints=checkpoints.newest_first,
        progress=progress,
    )


def train_all(rank: int, world_size: int, jobs: list[Job]) -> None:
    """One worker: train all the jobs, one after the other."""
    for spec, directory in jobs:
        result = train(spec, group_train_context(rank, world_size, directory))
        if rank == 0:
            (directory / "result").write_bytes(pickle.dumps(result))


def in_group(rank: int, world_size: int, rendezvous: Path, work: Callable[..., None], *args: object) -> None:
    """Call `work(rank, world_size, *args)` within a gloo group."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    store = dist.FileStore(str(rendezvous), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    work(rank, world_size, *args)
    dist.destroy_process_group()


def run_group(world_size: int, directory: Path, work: Callable[..., None], *args: object) -> None:
    """Run `work` in `world_size` new processes; an error or death of one ends all and is raised.

    `directory` is new to each call.
    """
    directory.mkdir(parents=True)
    spawned = (world_size, directory / "rendezvous", work, *args)
    multiprocessing.spawn(in_group, spawned, nprocs=world_size)


def result_of(directory: Path) -> RecoveryResult:
    return pickle.loads((directory / "result").read_bytes())


def with_stages(spec: RecoverySpec, stages: dict[str, str], directory: Path) -> Iterator[Job]:
    """The same request under each DeepSpeed configuration."""
    for name, deepspeed in stages.items():
        yield replace(spec, deepspeed=deepspeed), directory / name
