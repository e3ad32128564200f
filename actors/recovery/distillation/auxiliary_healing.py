"""Healing with an auxiliary loss at the place where layers were cut out (Gromov et al., Eq. 8).

L_aux = ( x^{(ℓ*+n)}(θ₀) − x^{(ℓ*)}(θ) )²: what enters layer ℓ*+n in the unpruned
model against what enters that same layer after pruning.
"""

import torch

from actors.data import TokenBatch
from actors.errors import RequestError
from actors.recovery.distillation.lockstep import Lockstep, check_layer_map
from actors.recovery.distillation.student import Checkpointing, Terms
from actors.recovery.distillation.teacher_student import TeacherStudent
from actors.recovery.losses.cross_entropy import next_token_cross_entropy
from actors.recovery.losses.layer_losses import hidden_mse
from actors.recovery.losses.lm_head import LMHead
from actors.recovery.losses.token_weights import distillation_weights, next_ids, prediction_weights


class AuxiliaryHealing(Lockstep):
    """Next-token prediction, and at every cut the squared mismatch of what enters the next layer.

    Args:
        pair: student and teacher, with the map of their layers.
        auxiliary: weight of the mismatch. The paper leaves its scale open; here it
            is a mean over tokens and D, summed over the cuts.
        gradient_checkpointing: see `Student`.

    Raises:
        RequestError: the places where layers were cut out are not given.
    """

    def __init__(self, pair: TeacherStudent, auxiliary: float, gradient_checkpointing: Checkpointing = False):
        if pair.teacher_layers is None:
            raise RequestError(
                "objective 'healing_aux' compares both sides of each cut: give recovery.teacher_layers, the "
                "teacher's layers that the student still has, or use the objective 'healing'"
            )
        check_layer_map(pair)
        super().__init__(pair, gradient_checkpointing)
        self._auxiliary = auxiliary
        self._head = LMHead(pair.student)
        # The end stands for the final norm, which a cut may lie before as well.
        self._entered = (*pair.teacher_layers, self._teacher_depth)

    def forward(self, batch: TokenBatch) -> Terms:
        """Return `causal_lm`, `auxiliary`, and their weighted sum as `loss`."""
        student_pass, teacher_pass = self.layerwise_passes(batch)
        student_BTD, teacher_BTD, first, done = self.enter(batch, student_pass, teacher_pass)
        token_weights, mismatch = distillation_weights(batch), torch.zeros((), device=student_BTD.device)
        # The teacher goes no further than to the last cut.
        expected = first
        for position, entered in enumerate(self._entered[first:], start=first):
            if entered != expected:
                teacher_BTD, _ = self.advance_teacher(teacher_pass, range(done, entered), teacher_BTD)
                mismatch = mismatch + hidden_mse(student_BTD, teacher_BTD, token_weights)
                done = entered
            if position < len(self.pair.student_layers):
                layer = self.pair.student_layers[position]
                student_BTD, _ = self.block(student_pass, layer, student_BTD)
            expected = entered + 1
        hidden_BTD = student_pass.finish(student_BTD)
        likelihood = next_token_cross_entropy(
            hidden_BTD, next_ids(batch), self._head, prediction_weights(batch)
        )
        return {
            "causal_lm": likelihood,
            "auxiliary": mismatch,
            "loss": likelihood + self._auxiliary * mismatch,
        }
