"""The base of the training modules of all objectives: the student, run block by block."""

from typing import Literal

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from actors.data import TokenBatch
from actors.models import LayerwisePass, find_layers
from actors.recovery.adapters.fused_lora import use_fused_forward
from actors.recovery.adapters.lora import lora_layers
from actors.recovery.distillation.prefix import first_trainable
from actors.recovery.distillation.teacher_student import TeacherStudent
from actors.recovery.losses.attention_recorder import AttentionRecorder

Terms = dict[str, Tensor]
Checkpointing = bool | Literal["auto"]


class Student(nn.Module):
    """Base of the training modules: the student's pass through its layers.

    Args:
        pair: the student, and its teacher if an objective has one.
        gradient_checkpointing: keep only what enters each of the student's blocks
            and compute the block again in the backward pass; the gradients,
            dropout included, are the same. With `auto`, of the share `checkpointed` of them.
        attention: read the student's attention matrices.

    Attributes:
        first_trainable: position of the student's first block that is trained; none before it takes part in
            the backward pass, since nothing of them requires a gradient.

    Raises:
        RequestError: attention matrices are wanted and the family, or its
            attention implementation, has none.
    """

    def __init__(
        self, pair: TeacherStudent, gradient_checkpointing: Checkpointing = False, attention: bool = False
    ):
        super().__init__()
        self.pair = pair
        self.model = pair.student
        self.checkpointed = 1.0 if gradient_checkpointing is True else 0.0
        self._recorder = AttentionRecorder(pair.student) if attention else None
        self._lora = [lora_layers(block) for block in find_layers(pair.student).modules]
        self.first_trainable = first_trainable(pair)
        for layers in self._lora:
            use_fused_forward(layers)

    def train(self, mode: bool = True) -> "Student":
        """Set dropout of what is trained to the mode: the adapters' own, or all in full fine-tuning.

        Frozen weights stay as they are evaluated; they may serve a teacher too.
        """
        super().train(False)
        self.training = mode
        if self.pair.adapted is None:
            self.model.train(mode)
        for layer in (layer for block in self._lora for layer in block):
            layer.lora_dropout.train(mode)
        return self

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Return the student's last hidden state after the final norm [B, T, D]."""
        layerwise = layerwise_pass(self.model, batch)
        hidden_BTD, done = layerwise.hidden_BTD, 0
        if batch.entering_BTD is not None:
            hidden_BTD, done = batch.entering_BTD.to(hidden_BTD.dtype), self.first_trainable
        for layer in self.pair.student_layers[done:]:
            hidden_BTD, _ = self.block(layerwise, layer, hidden_BTD)
        return layerwise.finish(hidden_BTD)

    def block(self, layerwise: LayerwisePass, layer: int, hidden_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run one of the student's blocks; return output and, if recorded, attention matrix [B, H, T, T]."""
        layers = self.pair.student_layers
        checkpointed = layers.index(layer) < self.checkpointed * len(layers)
        if checkpointed and is_grad_enabled():
            return checkpoint(run_block, layerwise, layer, hidden_BTD, self._recorder, use_reentrant=False)
        return run_block(layerwise, layer, hidden_BTD, self._recorder)


def layerwise_pass(model: nn.Module, batch: TokenBatch) -> LayerwisePass:
    """Return the layerwise pass of a batch through a model."""
    return LayerwisePass(model, batch.input_ids_BT, batch.mask_BT, batch.position_ids_BT)


def run_block(
    layerwise: LayerwisePass, layer: int, hidden_BTD: Tensor, recorder: AttentionRecorder | None
) -> tuple[Tensor, Tensor | None]:
    """Run one block and return its output and, with a recorder, its attention matrix."""
    if recorder is None:
        return layerwise.block(layer, hidden_BTD), None
    return recorder.read(layer, lambda: layerwise.block(layer, hidden_BTD))
