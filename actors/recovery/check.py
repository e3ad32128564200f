"""Refusing a recovery that could not run, before anything starts."""

from actors.contracts import RecoverySpec
from actors.errors import RequestError
from actors.recovery.adapters import check_adapter
from actors.recovery.engine import deepspeed_config
from actors.recovery.objectives import find_objective
from actors.recovery.pair import check_teacher
from actors.recovery.schedule import lr_at


def check_recovery(spec: RecoverySpec, workers: int) -> None:
    """Check all of a recovery's settings that can be checked without model and data.

    Raises:
        RequestError: an unknown objective, adapter kind or schedule, batch sizes
            that do not divide, a DeepSpeed JSON that contradicts them, or no loss.
    """
    if find_objective(spec.objective).build is None:
        return
    if spec.model.merges:
        raise RequestError(
            f"recovery {spec.objective!r} trains adapters on the source model's own weights and cannot heal "
            "merged layers; use recovery.objective: none with the criterion laco"
        )
    check_adapter(spec)
    check_teacher(spec)
    if not any((spec.loss.hidden, spec.loss.attention, spec.loss.logits)):
        raise RequestError("recovery.loss: every term has weight 0; give at least one a weight")
    per_step = spec.batch_size * spec.sequence_length
    if spec.max_tokens < per_step:
        raise RequestError(
            f"recovery.max_tokens {spec.max_tokens} is less than one batch of {spec.batch_size} x "
            f"{spec.sequence_length} = {per_step} tokens; raise it or make the batch smaller"
        )
    deepspeed_config(spec, workers)
    lr_at(0, 1, spec.learning_rate, spec.lr_schedule)
