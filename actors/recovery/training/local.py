"""Recovery in this process alone, with checkpoints in a local directory."""

import logging
from dataclasses import replace
from pathlib import Path

from actors.contracts import Progress, RecoveryResult, RecoverySpec, digest, no_progress, to_json
from actors.recovery.training.checkpoint import CheckpointDirectory
from actors.recovery.training.deepspeed_config import settings_fingerprint
from actors.recovery.training.engine import single_process_group
from actors.recovery.training.train_context import TrainContext
from actors.recovery.training.train_loop import MicroBatchError, train


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
    checkpoints = CheckpointDirectory(Path(work_dir) / f"recovery-{_fingerprint(spec)[:16]}")
    context = TrainContext(
        rank=0,
        world_size=1,
        adapter_uri=adapter_uri,
        micro_batch_hint_uri=str(checkpoints.path / "micro_batch_size"),
        save_checkpoint=checkpoints.save,
        checkpoints=checkpoints.newest_first,
        progress=progress,
    )
    with single_process_group():
        result = _train(spec, context)
    checkpoints.remove()
    return result


def _fingerprint(spec: RecoverySpec) -> str:
    """Hash of what a checkpoint's content depends on: not how often it is written or how the work is cut."""
    sources = to_json(replace(spec, micro_batch_size=1, checkpoint_steps=1, deepspeed=""))
    return digest([settings_fingerprint(spec), sources])


def _train(spec: RecoverySpec, context: TrainContext) -> RecoveryResult:
    """Train from the last checkpoint for as long as a smaller micro-batch may still fit."""
    while True:
        try:
            return train(spec, context)
        except MicroBatchError as error:
            logging.getLogger(__name__).warning("%s", error)
