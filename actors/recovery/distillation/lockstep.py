"""Teacher and student advancing together, so that only one hidden state of the teacher is in memory."""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from actors.contracts import LossSpec
from actors.data import TokenBatch
from actors.errors import RequestError
from actors.models import LayerwisePass, depth, find_layers, text_config
from actors.recovery.adapters.lora import adapters_disabled
from actors.recovery.distillation.student import Checkpointing, Student, layerwise_pass, run_block
from actors.recovery.distillation.teacher_student import TeacherStudent
from actors.recovery.losses.attention_recorder import AttentionRecorder


class Lockstep(Student):
    """Base of the modules that compare the student with a teacher layer by layer.

    If the pair's teacher is its student with adapters off, both pass through the
    same modules, and the frozen weights exist once. A separate teacher's depth
    and width are its own.

    Args:
        pair: student and teacher.
        gradient_checkpointing: see `Student`; the teacher needs no gradient.
        attention: read the attention matrices of both.
    """

    def __init__(
        self, pair: TeacherStudent, gradient_checkpointing: Checkpointing = False, attention: bool = False
    ):
        super().__init__(pair, gradient_checkpointing, attention)
        self.teacher = pair.teacher
        self._shared = pair.teacher is None
        self._teacher_recorder = (
            AttentionRecorder(pair.teacher) if attention and pair.teacher is not None else self._recorder
        )
        self._teacher_depth = len(find_layers(pair.teacher or pair.student).modules)

    def layerwise_passes(self, batch: TokenBatch) -> tuple[LayerwisePass, LayerwisePass]:
        """Return the layerwise passes of a batch through student and teacher."""
        student = layerwise_pass(self.model, batch)
        if self.teacher is None:
            return student, student
        with torch.no_grad():
            return student, layerwise_pass(self.teacher, batch)

    @torch.no_grad()
    def advance_teacher(
        self, layerwise: LayerwisePass, layers: Iterable[int], teacher_BTD: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the teacher's hidden state after these layers, and the last one's attention matrix."""
        attention_BHTT = None
        for layer in layers:
            with adapters_disabled(self._lora[layer]) if self._shared else nullcontext():
                teacher_BTD, attention_BHTT = run_block(layerwise, layer, teacher_BTD, self._teacher_recorder)
        return teacher_BTD.detach(), attention_BHTT


def check_comparable(pair: TeacherStudent, loss: LossSpec) -> None:
    """Refuse terms that compare what a separate teacher and the student do not have in common.

    Raises:
        RequestError: names the term and what differs.
    """
    if (loss.hidden or loss.attention) and pair.teacher_layers is None:
        raise RequestError(
            "recovery.loss.hidden and recovery.loss.attention compare single layers, but nothing tells which "
            "layer of the teacher belongs to which of the student; give recovery.teacher_layers, or set both "
            "to 0"
        )
    check_layer_map(pair)
    if pair.teacher is None:
        return
    student, teacher = text_config(pair.student.config), text_config(pair.teacher.config)
    fields = {"hidden": "hidden_size", "attention": "num_attention_heads", "logits": "vocab_size"}
    for term, name in fields.items():
        of_student, of_teacher = getattr(student, name, None), getattr(teacher, name, None)
        if getattr(loss, term) and of_student != of_teacher:
            raise RequestError(
                f"recovery.loss.{term} cannot compare student and teacher: {name} is {of_student} in the "
                f"one and {of_teacher} in the other; set its weight to 0 or choose another teacher"
            )


def check_layer_map(pair: TeacherStudent) -> None:
    """Refuse a map(l) that is not one ascending layer of the teacher for each of the student.

    Raises:
        RequestError: names what the map must be.
    """
    layers = pair.teacher_layers
    if layers is None:
        return
    num_layers = depth((pair.teacher or pair.student).config)
    ascending = all(a < b for a, b in zip((-1, *layers), (*layers, num_layers), strict=True))
    if len(layers) != len(pair.student_layers) or not ascending:
        raise RequestError(
            f"recovery.teacher_layers {list(layers)} must name, in ascending order, one of the teacher's "
            f"layers 0 to {num_layers - 1} for each of the student's {len(pair.student_layers)} layers"
        )
