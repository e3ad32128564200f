"""The context that a worker trains in: its rank, and where its checkpoints and results go."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from actors.artifacts import read_bytes, write_bytes
from actors.contracts import Progress

CHECKPOINTS_TO_KEEP = 2
"""Checkpoints of a recovery that are kept: the newest may turn out damaged."""

CHECKPOINTED_STEP = 0.25
"""Share of the blocks by which more are computed again, where memory does not suffice."""

WriteShard = Callable[[Path], None]
"""Writes this worker's share of a checkpoint into an empty directory."""


@dataclass(frozen=True)
class MemoryUse:
    """How a worker cuts its work so that it fits into memory; none of it changes the result.

    Attributes:
        micro_batch_size: sequences of one forward pass.
        checkpointed: share of the student's blocks that the backward pass computes again, where
            `recovery.gradient_checkpointing` is `auto`.
    """

    micro_batch_size: int
    checkpointed: float = 0.0

    def smaller(self, auto: bool) -> "MemoryUse | None":
        """Return the next smaller use: half the micro-batch, then with `auto` more blocks; None at the end.

        Micro-batches come first: they cost little, and every block computed again costs a forward pass.
        """
        if self.micro_batch_size > 1:
            return replace(self, micro_batch_size=self.micro_batch_size // 2)
        if auto and self.checkpointed < 1:
            return replace(self, checkpointed=min(1.0, self.checkpointed + CHECKPOINTED_STEP))
        return None

    def __str__(self) -> str:
        share = f" {self.checkpointed:g}" if self.checkpointed else ""
        return f"{self.micro_batch_size}{share}"

    @classmethod
    def parse(cls, text: str) -> "MemoryUse":
        """Return what `str` wrote."""
        size, _, share = text.partition(" ")
        return cls(int(size), float(share or 0))


@dataclass(frozen=True)
class TrainContext:
    """The context that a worker trains in.

    Attributes:
        rank, world_size: a process group of that size must exist.
        adapter_uri: where rank 0 publishes what was trained.
        micro_batch_hint_uri: a file that outlives the worker and keeps the `MemoryUse` that fits.
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

    def memory_hint(self) -> MemoryUse | None:
        """Return what an earlier try fell back to."""
        noted = read_bytes(self.micro_batch_hint_uri)
        return MemoryUse.parse(noted.decode()) if noted else None

    def save_memory_hint(self, use: MemoryUse) -> None:
        write_bytes(self.micro_batch_hint_uri, str(use).encode())
