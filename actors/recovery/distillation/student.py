"""The model in training, walked block by block: what the modules of all objectives share."""

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from actors.data import TokenBatch
from actors.models import LayerwisePass, find_layers
from actors.recovery.adapters.adapters import lora_layers
from actors.recovery.adapters.low_rank import speed_up
from actors.recovery.distillation.teacher_student import Pair
from actors.recovery.losses.attention import AttentionTap

Terms = dict[str, Tensor]


class Student(nn.Module):
    """Base of the training modules: the student's way through its layers.

    Args:
        pair: the student, and its teacher if an objective has one.
        gradient_checkpointing: keep only what enters each of the student's blocks
            and compute the block again in the backward pass; the gradients,
            dropout included, are the same.
        attention: read the student's attention matrices.

    Raises:
        RequestError: attention matrices are wanted and the family, or its
            attention implementation, has none.
    """

    def __init__(self, pair: Pair, gradient_checkpointing: bool = False, attention: bool = False):
        super().__init__()
        self.pair = pair
        self.model = pair.student
        self._checkpointing = gradient_checkpointing
        self._tap = AttentionTap(pair.student) if attention else None
        self._lora = [lora_layers(block) for block in find_layers(pair.student).modules]
        for layers in self._lora:
            speed_up(layers)

    def train(self, mode: bool = True) -> "Student":
        """Dropout of what is trained follows the mode: the adapters' own, or all in full fine-tuning.

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
        """The student's last hidden state after the final norm [B, T, D]."""
        way = way_through(self.model, batch)
        hidden_BTD = way.hidden_BTD
        for layer in self.pair.student_layers:
            hidden_BTD, _ = self.block(way, layer, hidden_BTD)
        return way.finish(hidden_BTD)

    def student_hidden(self, input_ids_BT: Tensor) -> Tensor:
        """The same for rows of one document each, without padding."""
        return self.hidden(TokenBatch(input_ids_BT))

    def block(self, way: LayerwisePass, layer: int, hidden_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output of one of the student's blocks, and its attention matrix [B, H, T, T] if that is read."""
        if self._checkpointing and is_grad_enabled():
            return checkpoint(run_block, way, layer, hidden_BTD, self._tap, use_reentrant=False)
        return run_block(way, layer, hidden_BTD, self._tap)


def way_through(model: nn.Module, batch: TokenBatch) -> LayerwisePass:
    """The batch's way through the blocks of a model."""
    return LayerwisePass(model, batch.input_ids_BT, batch.mask_BT, batch.position_ids_BT)


def run_block(
    way: LayerwisePass, layer: int, hidden_BTD: Tensor, tap: AttentionTap | None
) -> tuple[Tensor, Tensor | None]:
    """Output of a block and, with a tap, its attention matrix."""
    if tap is None:
        return way.block(layer, hidden_BTD), None
    return tap.read(layer, lambda: way.block(layer, hidden_BTD))
