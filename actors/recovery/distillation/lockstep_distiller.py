"""Distillation of hidden states, attention matrices and logits, teacher and student in lockstep.

IteRABRe §3.2, map(l) being the l-th source layer that is not dropped (App. E):
L = Σ_l [ MSE(H_T^{map(l)}, H_S^l) + MSE(A_T^{map(l)}, A_S^l) ] + MSE(z_T, z_S).
"""

import torch
from torch import Tensor

from actors.contracts import LossSpec
from actors.data import TokenBatch
from actors.errors import RequestError
from actors.recovery.distillation.lockstep import Lockstep, check_comparable
from actors.recovery.distillation.student import Checkpointing, Terms
from actors.recovery.distillation.teacher_student import TeacherStudent
from actors.recovery.losses.layer_losses import attention_mse, hidden_mse
from actors.recovery.losses.lm_head import LMHead, common_gram
from actors.recovery.losses.logit_losses import chunked_logit_loss, find_logit_loss, logit_mse_from_hidden
from actors.recovery.losses.token_weights import distillation_weights

LAYER_TERMS = ("hidden", "attention")


class LockstepDistiller(Lockstep):
    """The student learns from the teacher's layers and logits.

    Args:
        pair: student and teacher, in one model or in two.
        loss: weight of each term; a term of weight 0 is not computed.
        gradient_checkpointing: see `Student`.

    Raises:
        RequestError: no term has a weight, the family has no attention matrices
            although the attention term is on, or the two cannot be compared.
    """

    def __init__(self, pair: TeacherStudent, loss: LossSpec, gradient_checkpointing: Checkpointing = False):
        weights = {"hidden": loss.hidden, "attention": loss.attention, "logits": loss.logits}
        if not any(weights.values()):
            raise RequestError("every loss term of the distillation has weight 0; give one of them a weight")
        check_comparable(pair, loss)
        super().__init__(pair, gradient_checkpointing, attention=bool(loss.attention))
        self._weights = weights
        self._distance = find_logit_loss(loss.logit_loss, loss.temperature)
        self._heads = LMHead(pair.student), LMHead(pair.teacher or pair.student)
        by_gram = loss.logits and loss.logit_loss == "mse"
        self._gram_DD: Tensor | None
        self.register_buffer("_gram_DD", common_gram(*self._heads) if by_gram else None, persistent=False)
        # Without a map, no hidden state of the teacher is needed before its last.
        self._map = pair.teacher_layers or (-1,) * len(pair.student_layers)

    def forward(self, batch: TokenBatch) -> Terms:
        """Return the loss terms of one batch, and their weighted sum as `loss`.

        Returns:
            Scalars: `hidden` and `attention` are sums over the student's layers,
            `logits` is one value, each as `layer_losses` and `logit_losses` define it;
            only terms with a weight.
        """
        token_weights = distillation_weights(batch)
        student_pass, teacher_pass = self.layerwise_passes(batch)
        student_BTD, teacher_BTD = student_pass.hidden_BTD, teacher_pass.hidden_BTD.detach()
        terms = {
            name: torch.zeros((), device=student_BTD.device) for name in LAYER_TERMS if self._weights[name]
        }
        done = 0
        for student_layer, teacher_layer in zip(self.pair.student_layers, self._map, strict=True):
            teacher_BTD, teacher_BHTT = self.advance_teacher(
                teacher_pass, range(done, teacher_layer + 1), teacher_BTD
            )
            student_BTD, student_BHTT = self.block(student_pass, student_layer, student_BTD)
            done = teacher_layer + 1
            if "hidden" in terms:
                terms["hidden"] = terms["hidden"] + hidden_mse(student_BTD, teacher_BTD, token_weights)
            if "attention" in terms:
                distance = attention_mse(student_BHTT, teacher_BHTT, token_weights, batch.mask_BT)
                terms["attention"] = terms["attention"] + distance
            # Neither matrix may outlive its layer.
            del teacher_BHTT, student_BHTT
        if self._weights["logits"]:
            teacher_BTD, _ = self.advance_teacher(teacher_pass, range(done, self._teacher_depth), teacher_BTD)
            with torch.no_grad():
                teacher_BTD = teacher_pass.finish(teacher_BTD)
            student_BTD = student_pass.finish(student_BTD)
            if self._gram_DD is None:
                terms["logits"] = chunked_logit_loss(
                    student_BTD, teacher_BTD, self._heads, self._distance, token_weights
                )
            else:
                terms["logits"] = logit_mse_from_hidden(
                    student_BTD, teacher_BTD, self._gram_DD, token_weights
                )
        terms["loss"] = sum((self._weights[name] * value for name, value in terms.items()), torch.tensor(0.0))
        return terms
