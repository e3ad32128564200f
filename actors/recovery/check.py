"""Checks of a recovery's settings, before anything starts."""

from actors.contracts import RecoverySpec
from actors.errors import RequestError
from actors.recovery.adapters.lora import check_adapter
from actors.recovery.distillation.teacher_student import check_teacher
from actors.recovery.objectives import find_objective
from actors.recovery.training.deepspeed_config import deepspeed_config, precision_of
from actors.recovery.training.lr_schedule import lr_at
from actors.recovery.training.training_data import check_data


def check_recovery(spec: RecoverySpec, workers: int) -> None:
    """Check all of a recovery's settings that can be checked without model and data.

    Raises:
        RequestError: an unknown objective, adapter kind or schedule, batch sizes
            that do not divide, a DeepSpeed JSON that contradicts them, or no loss.
    """
    objective = find_objective(spec.objective)
    if not objective.applies_recovery:
        return
    if spec.model.merges:
        raise RequestError(
            f"recovery {spec.objective!r} trains adapters on the source model's own weights and cannot heal "
            "merged layers; use recovery.objective: none with the criterion laco"
        )
    check_data(spec.objective, spec.data)
    check_teacher(spec, objective.has_teacher)
    if objective.build is None:
        return
    check_adapter(spec)
    if objective.weights and not any(getattr(spec.loss, name) for name in objective.weights):
        raise RequestError(
            f"recovery.loss: {', '.join(objective.weights)} all have weight 0, and {spec.objective!r} has no "
            "other terms; give one of them a weight"
        )
    per_step = spec.batch_size * spec.sequence_length
    if spec.max_tokens < per_step:
        raise RequestError(
            f"recovery.max_tokens {spec.max_tokens} is less than one batch of {spec.batch_size} x "
            f"{spec.sequence_length} = {per_step} tokens; raise it or make the batch smaller"
        )
    precision_of(spec)
    deepspeed_config(spec, workers)
    lr_at(0, 1, spec.learning_rate, spec.lr_schedule)
