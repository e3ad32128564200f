"""Checks of a recovery's settings, before anything starts."""

from actors.contracts import RecoverySpec
from actors.errors import RequestError
from actors.recovery.adapters.lora import check_adapter
from actors.recovery.distillation.teacher_student import check_teacher
from actors.recovery.objectives import find_objective
from actors.recovery.training.deepspeed_config import deepspeed_config, precision_of
from actors.recovery.training.lr_schedule import lr_at
from actors.recovery.training.training_data import check_data


def cache_obstacle(spec: RecoverySpec, cache: str) -> str | None:
    """Return why the teacher has to run in this recovery, in words after "because"; None if it need not.

    Args:
        cache: what of the teacher is stored: `hidden` or `topk`, as `recovery.teacher_cache` names it.
    """
    if spec.objective != "kd":
        return f"the objective {spec.objective!r} has no use for the teacher's last hidden state"
    loss = spec.loss
    if loss.attention or (loss.hidden and loss.hidden_layers == "all"):
        return "recovery.loss.hidden and recovery.loss.attention compare single layers"
    if not (loss.hidden or loss.logits):
        return "recovery.loss compares nothing with the teacher"
    if spec.adapter.kind == "qlora":
        return "the teacher of recovery.adapter.kind qlora is the quantised model"
    if cache == "topk":
        if loss.hidden:
            return "recovery.loss.hidden compares states, and topk stores none"
        if loss.logit_loss == "mse" or loss.temperature != 1:
            return "topk stores probabilities at temperature 1, and no logits"
        return None
    if spec.teacher is not None:
        return "recovery.teacher has a head of its own; topk stores what comes out of it"
    if spec.adapter.kind == "full":
        return (
            "recovery.adapter.kind full trains the head that would give the teacher's logits; topk does not"
        )
    return None


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
