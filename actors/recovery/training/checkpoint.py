"""Training checkpoints that any number of workers can read back.

Worker r of W writes the tensors numbered r, r + W, r + 2W, … of the training
state, whole, into `part-r-of-W.safetensors`; worker 0 also writes `state.json`.
Beside every file lies its SHA-256. So a checkpoint neither depends on how
DeepSpeed shards its state nor on how many workers it is continued with, and
a corrupt one is found before anything of it is used.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.artifacts import explained, sha256_of
from actors.errors import WorkError
from actors.models.loading.checkpoint import header_of, read_header
from actors.recovery.training.train_context import CHECKPOINTS_TO_KEEP, WriteShard

STATE = "state.json"
FLOAT32_BYTES = 4


class CorruptCheckpointError(WorkError):
    """A checkpoint's files are not what was written; the one before it may be whole."""


def write_shard(
    directory: Path,
    rank: int,
    world_size: int,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[Tensor],
    state: dict[str, Any],
) -> None:
    """Write this worker's tensors one after the other, and `state` if it is worker 0's.

    Args:
        shapes: of the float32 tensors, by name, in the order in which they come.
        tensors: of which one at a time need be in memory.

    Raises:
        WorkError: they do not fit on the disk, or cannot be written; names place and bytes.
    """
    header, size_bytes = header_of(
        (name, "F32", shape, FLOAT32_BYTES * math.prod(shape)) for name, shape in shapes.items()
    )
    part = directory / f"part-{rank}-of-{world_size}.safetensors"
    with explained(str(directory), f"write a checkpoint of {size_bytes} bytes into"):
        with part.open("wb") as file:
            file.write(header)
            for tensor in tensors:
                file.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        _write_checksum(part)
        if rank == 0:
            (directory / STATE).write_text(json.dumps({**state, "parts": world_size}))
            _write_checksum(directory / STATE)


def read_state(directory: Path) -> dict[str, Any]:
    """Return the `state` of a checkpoint all of whose files are intact.

    Raises:
        CorruptCheckpointError: one is missing or not as it was written.
    """
    _verify_checksum(directory / STATE)
    state = json.loads((directory / STATE).read_text())
    for part in _parts(directory, state["parts"]):
        _verify_checksum(part)
    return state


def read_tensors(directory: Path, num_parts: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint that `read_state` found intact."""
    for part in _parts(directory, num_parts):
        for tensor in read_header(part):
            yield tensor.name, tensor.read()


class CheckpointDirectory:
    """Checkpoints of one process: each whole or absent, only the last few kept."""

    def __init__(self, path: Path):
        self.path = path

    def save(self, steps_done: int, write: WriteShard) -> None:
        """Fill a temporary directory by `write` and rename it once it is complete."""
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.path / f"step_{steps_done:06d}"
        scratch = Path(tempfile.mkdtemp(dir=self.path, prefix=".writing-"))
        try:
            write(scratch)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for old in self._all()[:-CHECKPOINTS_TO_KEEP]:
            shutil.rmtree(old)

    def newest_first(self) -> Iterator[AbstractContextManager[Path]]:
        """Return the directories of the complete checkpoints."""
        return (nullcontext(path) for path in reversed(self._all()))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.path.glob("step_*"))


def _parts(directory: Path, num_parts: int) -> list[Path]:
    return [directory / f"part-{i}-of-{num_parts}.safetensors" for i in range(num_parts)]


def _write_checksum(path: Path) -> None:
    with path.open("rb") as file:
        sha256, _ = sha256_of(file)
    path.with_name(f"{path.name}.sha256").write_text(sha256)


def _verify_checksum(path: Path) -> None:
    seal = path.with_name(f"{path.name}.sha256")
    if not (path.is_file() and seal.is_file()):
        raise CorruptCheckpointError(f"checkpoint file {path} is missing")
    with path.open("rb") as file:
        sha256, _ = sha256_of(file)
    if sha256 != seal.read_text():
        raise CorruptCheckpointError(f"checkpoint file {path} is not what was written (SHA-256 {sha256})")
