"""Teacher and student advancing together, so that only one hidden state of the teacher is in memory."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from actors.contracts import LossSpec
from actors.data import TokenBatch
from actors.errors import RequestError
from actors.models import LayerwisePass, depth, find_layers, text_config
from actors.recovery.adapters.lora import adapters_disabled
from actors.recovery.distillation.prefix import shared_prefix
from actors.recovery.distillation.student import Checkpointing, Student, layerwise_pass, run_block
from actors.recovery.distillation.teacher_student import TeacherStudent
from actors.recovery.losses.attention_recorder import AttentionRecorder


class Entered(NamedTuple):
    """Where student and teacher part.

    Attributes:
        student_BTD, teacher_BTD: what enters their next blocks.
        student_done, teacher_done: how many blocks each has behind it.
    """

    student_BTD: Tensor
    teacher_BTD: Tensor
    student_done: int
    teacher_done: int


class Lockstep(Student):
    """Base of the modules that compare the student with a teacher layer by layer.

    If the pair's teacher is its student with adapters off, both pass through the
    same modules, and the frozen weights exist once; the first blocks, as long as they
    are the same for both, run once. A separate teacher's depth and width are its own.

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
        self._prefix = shared_prefix(pair)
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

    def enter(self, batch: TokenBatch, student: LayerwisePass, teacher: LayerwisePass) -> Entered:
        """Run the blocks that are the same in student and teacher, or take what the batch has of them."""
        if batch.entering_BTD is not None:
            entering_BTD = batch.entering_BTD.to(student.hidden_BTD.dtype)
            done = self.first_trainable
            if self._shared:
                return Entered(entering_BTD, entering_BTD, done, done)
            return Entered(entering_BTD, teacher.hidden_BTD.detach(), done, 0)
        if not self._prefix:
            return Entered(student.hidden_BTD, teacher.hidden_BTD.detach(), 0, 0)
        with torch.no_grad():
            hidden_BTD = student.hidden_BTD
            for layer in range(self._prefix):
                hidden_BTD = student.block(layer, hidden_BTD)
        return Entered(hidden_BTD, hidden_BTD, self._prefix, self._prefix)

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
    by_layer = loss.attention or (loss.hidden and loss.hidden_layers == "all")
    if by_layer and pair.teacher_layers is None:
        raise RequestError(
            "recovery.loss.hidden and recovery.loss.attention compare single layers, but nothing tells which "
            "layer of the teacher belongs to which of the student; give recovery.teacher_layers, or set both "
            "to 0 (or recovery.loss.hidden_layers to last)"
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
