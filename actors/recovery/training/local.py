"""Recovery in this process alone, with checkpoints in a local directory."""

import logging
from dataclasses import replace
from pathlib import Path

from actors.contracts import Progress, RecoveryResult, RecoverySpec, digest, no_progress, on_cluster, to_json
from actors.recovery.training.checkpoint import CheckpointDirectory
from actors.recovery.training.deepspeed_config import settings_fingerprint
from actors.recovery.training.engine import single_process_group
from actors.recovery.training.failures import MicroBatchError
from actors.recovery.training.train_context import TrainContext
from actors.recovery.training.train_loop import train


def recover_locally(
    spec: RecoverySpec, adapter_uri: str, work_dir: str | Path, progress: Progress = no_progress
) -> RecoveryResult:
    """Run recovery in this process; after an interruption, go on from the last checkpoint.

    Args:
        spec: what to train.
        adapter_uri: where the trained adapter is published.
        work_dir: a local directory for checkpoints; their names depend on `spec`;
            removed once recovery has ended well.

    Raises:
        RequestError, WorkError: as `train_loop.train`.
    """
    # Neither how often a checkpoint is written nor how the work is cut changes its content.
    same = replace(spec, micro_batch_size=1, checkpoint_steps=1, deepspeed="", teacher_states=None)
    fingerprint = digest([settings_fingerprint(spec), to_json(same)])
    checkpoints = CheckpointDirectory(Path(work_dir) / f"recovery-{fingerprint[:16]}")
    context = TrainContext(
        rank=0,
        world_size=1,
        adapter_uri=adapter_uri,
        micro_batch_hint_uri=str(checkpoints.path / "micro_batch_size"),
        save_checkpoint=checkpoints.save,
        checkpoints=checkpoints.newest_first,
        progress=progress,
        stop_requested=on_cluster(progress).stop_requested,
    )
    result = None
    with single_process_group():
        while result is None:
            try:
                result = train(spec, context)
            except MicroBatchError as error:
                logging.getLogger(__name__).warning("%s", error)
    checkpoints.remove()
    return result
