"""The context that a worker trains in: its rank, and where its checkpoints and results go."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from actors.artifacts import read_bytes, write_bytes
from actors.contracts import Progress

CHECKPOINTS_TO_KEEP = 2
"""Checkpoints of a recovery that are kept: the newest may turn out damaged."""

WriteShard = Callable[[Path], None]
"""Writes this worker's share of a checkpoint into an empty directory."""


@dataclass(frozen=True)
class TrainContext:
    """The context that a worker trains in.

    Attributes:
        rank, world_size: a process group of that size must exist.
        adapter_uri: where rank 0 publishes what was trained.
        micro_batch_hint_uri: a file that outlives the worker and keeps the micro-batch size that fits.
        save_checkpoint: (steps done, write); called by every worker at once.
        checkpoints: the whole checkpoints' directories, newest first.
        progress: called after every step, on rank 0.
        preemption_requested: whether the machine of any worker is announced to be taken
            away; every worker calls it after every step.
        stop_requested: whether the training is to end at the next checkpoint, to go on
            later; rank 0 calls it after every step.
    """

    rank: int
    world_size: int
    adapter_uri: str
    micro_batch_hint_uri: str
    save_checkpoint: Callable[[int, WriteShard], None]
    checkpoints: Callable[[], Iterator[AbstractContextManager[Path]]]
    progress: Progress
    preemption_requested: Callable[[], bool] = lambda: False
    stop_requested: Callable[[], bool] = lambda: False

    def micro_batch_hint(self) -> int | None:
        """Return the micro-batch size that an earlier try fell back to."""
        noted = read_bytes(self.micro_batch_hint_uri)
        return int(noted) if noted else None

    def save_micro_batch_hint(self, size: int) -> None:
        write_bytes(self.micro_batch_hint_uri, str(size).encode())
