"""The student's first blocks: which of them train nothing, and which compute what the teacher's do.

Below the first removed block, a student without adapters there is the teacher: those blocks run once for
both. Blocks before the first trained one need no gradient, and what enters it may come from a cache.
"""

from actors.models import find_layers
from actors.recovery.adapters.lora import lora_layers
from actors.recovery.distillation.teacher_student import TeacherStudent


def first_trainable(pair: TeacherStudent) -> int:
    """Return the position in the student of its first block that is trained; its depth if none is.

    `RecoverySpec.first_trainable` says the same before a model is loaded.
    """
    embeddings = pair.student.get_input_embeddings()
    if any(parameter.requires_grad for parameter in embeddings.parameters()):
        return 0
    blocks = find_layers(pair.student).modules
    trained = (
        position
        for position, layer in enumerate(pair.student_layers)
        if any(parameter.requires_grad for parameter in blocks[layer].parameters())
    )
    return next(trained, len(pair.student_layers))


def shared_prefix(pair: TeacherStudent) -> int:
    """Return how many of the student's first blocks are the teacher's, in one model with it.

    A block ends it that is not the teacher's at this depth, or has an adapter, of an earlier recovery or of
    this one. Two models share nothing.
    """
    if pair.teacher is not None or pair.teacher_layers is None:
        return 0
    blocks = find_layers(pair.student).modules
    changed = (
        position
        for position, layer in enumerate(pair.student_layers)
        if pair.teacher_layers[position] != position or lora_layers(blocks[layer])
    )
    return next(changed, len(pair.student_layers))
