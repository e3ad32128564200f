"""Recovery in this process alone, with checkpoints in a local directory."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.contracts import Progress, RecoveryResult, RecoverySpec, digest, no_progress, to_json
from actors.recovery.engine import single_process_group
from actors.recovery.train_loop import Workplace, Write, train

KEPT_CHECKPOINTS = 2


def recover_locally(
    spec: RecoverySpec, adapter_uri: str, work_dir: str | Path, progress: Progress = no_progress
) -> RecoveryResult:
    """Run recovery in this process; after an interruption, go on from the last checkpoint.

    Args:
        spec: what to train.
        adapter_uri: where the trained adapter is published.
        work_dir: a local directory for checkpoints; they are told apart by `spec`
            and removed once recovery has ended well.

    Raises:
        RequestError, WorkError: as `train_loop.train`.
    """
    checkpoints = CheckpointDirectory(Path(work_dir) / f"recovery-{digest(to_json(spec))[:16]}")
    workplace = Workplace(
        rank=0,
        world_size=1,
        adapter_uri=adapter_uri,
        save_checkpoint=checkpoints.save,
        open_checkpoint=checkpoints.open_last,
        progress=progress,
    )
    with single_process_group():
        result = train(spec, workplace)
    checkpoints.remove()
    return result


class CheckpointDirectory:
    """Checkpoints of one process: each whole or absent, only the last few kept."""

    def __init__(self, path: Path):
        self._path = path

    def save(self, steps_done: int, write: Write) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        target = self._path / f"step_{steps_done:06d}"
        scratch = Path(tempfile.mkdtemp(dir=self._path, prefix=".writing-"))
        try:
            write(scratch)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for old in self._all()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    @contextmanager
    def open_last(self) -> Iterator[Path | None]:
        """The newest checkpoint, or None."""
        yield next(reversed(self._all()), None)

    def remove(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self._path.glob("step_*"))
