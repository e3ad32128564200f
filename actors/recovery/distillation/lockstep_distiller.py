"""Distillation of hidden states, attention matrices and logits, teacher and student in lockstep.

IteRABRe §3.2, map(l) being the l-th source layer that is not dropped (App. E):
L = Σ_l [ MSE(H_T^{map(l)}, H_S^l) + MSE(A_T^{map(l)}, A_S^l) ] + MSE(z_T, z_S).

The paper does not say where H of the last block is taken. By default it is transformers' `hidden_states[-1]`,
the state after the final norm; the teacher's then goes through its own final norm, from whatever layer it is.
"""

import torch
from torch import Tensor

from actors.contracts import LossSpec
from actors.data import TokenBatch, TopK
from actors.errors import RequestError
from actors.models import LayerwisePass
from actors.recovery.distillation.lockstep import Lockstep, check_comparable
from actors.recovery.distillation.student import Checkpointing, Terms
from actors.recovery.distillation.teacher_student import TeacherStudent
from actors.recovery.losses.cross_entropy import next_token_cross_entropy
from actors.recovery.losses.fused_kernels import fused_heads, fused_logit_loss
from actors.recovery.losses.layer_losses import attention_mse, hidden_mse
from actors.recovery.losses.lm_head import LMHead, common_gram
from actors.recovery.losses.logit_losses import (
    NO_TARGET,
    check_topk,
    chunked_logit_loss,
    find_logit_loss,
    logit_mse_from_hidden,
)
from actors.recovery.losses.token_weights import (
    TokenWeights,
    distillation_weights,
    next_ids,
    prediction_weights,
)


class LockstepDistiller(Lockstep):
    """The student learns from the teacher's layers and logits, and from the text's next tokens.

    Args:
        pair: student and teacher, in one model or in two; or a student alone, whose batches then bring
            the teacher's last state or its most likely tokens.
        loss: weight of each term; a term of weight 0 is not computed.
        gradient_checkpointing: see `Student`.

    Raises:
        RequestError: no term has a weight, the family has no attention matrices
            although the attention term is on, or the two cannot be compared.
    """

    def __init__(self, pair: TeacherStudent, loss: LossSpec, gradient_checkpointing: Checkpointing = False):
        weights = {name: getattr(loss, name) for name in ("hidden", "attention", "logits", "next_token")}
        if not any(weights.values()):
            raise RequestError("every loss term of the distillation has weight 0; give one of them a weight")
        check_comparable(pair, loss)
        super().__init__(pair, gradient_checkpointing, attention=bool(loss.attention))
        self._loss, self._weights = loss, weights
        self._distance = find_logit_loss(loss.logit_loss, loss.temperature, loss.skew)
        self._heads = LMHead(pair.student), LMHead(pair.teacher or pair.student)
        by_gram = loss.logits and loss.logit_loss == "mse"
        self._gram_DD: Tensor | None
        self.register_buffer("_gram_DD", common_gram(*self._heads) if by_gram else None, persistent=False)
        fused = loss.logits and not loss.next_token
        self._fused_heads = fused_heads(loss.logit_loss, *self._heads) if fused else None
        self._by_layer = bool(loss.attention) or (bool(loss.hidden) and loss.hidden_layers == "all")

    def forward(self, batch: TokenBatch) -> Terms:
        """Return the loss terms of one batch, and their weighted sum as `loss`.

        Returns:
            Scalars: `hidden` and `attention` are sums over the student's layers, `logits` and
            `next_token` one value, each as `layer_losses`, `logit_losses` and `cross_entropy` define it;
            only terms with a weight.
        """
        token_weights = distillation_weights(batch)
        student_pass, teacher_pass = self.layerwise_passes(batch)
        if self._by_layer:
            terms, student_BTD, teacher = self._advance(batch, student_pass, teacher_pass)
        else:
            terms, student_BTD, teacher = self._student_alone(batch, student_pass, teacher_pass)
        if self._loss.hidden and self._loss.hidden_layers == "last":
            assert isinstance(teacher, Tensor)
            terms["hidden"] = hidden_mse(student_BTD, teacher, token_weights, self._normalised)
        total = sum((self._weights[name] * value for name, value in terms.items()), torch.tensor(0.0))
        if self._weights["logits"] or self._weights["next_token"]:
            last, of_logits = self._logit_terms(batch, student_BTD, teacher, token_weights)
            terms, total = terms | of_logits, total + last
        terms["loss"] = total
        return terms

    @property
    def _normalised(self) -> bool:
        return self._loss.hidden_scale == "normalised"

    def _advance(
        self, batch: TokenBatch, student_pass: LayerwisePass, teacher_pass: LayerwisePass
    ) -> tuple[Terms, Tensor, Tensor | TopK | None]:
        """Return the terms of single layers, and what student and teacher end in."""
        token_weights, layers = distillation_weights(batch), self.pair.student_layers
        assert self.pair.teacher_layers is not None
        after_norm = self._loss.last_hidden_state == "after_norm"
        student_BTD, teacher_BTD, first, done = self.enter(batch, student_pass, teacher_pass)
        # Blocks that are the same in both have no distance.
        terms = {
            name: torch.zeros((), device=student_BTD.device)
            for name in ("hidden", "attention")
            if self._weights[name] and (name, self._loss.hidden_layers) != ("hidden", "last")
        }
        for position in range(first, len(layers)):
            reached = self.pair.teacher_layers[position] + 1
            teacher_BTD, teacher_BHTT = self.advance_teacher(teacher_pass, range(done, reached), teacher_BTD)
            student_BTD, student_BHTT = self.block(student_pass, layers[position], student_BTD)
            done = reached
            if "hidden" in terms and (position + 1 < len(layers) or not after_norm):
                distance = hidden_mse(student_BTD, teacher_BTD, token_weights, self._normalised)
                terms["hidden"] = terms["hidden"] + distance
            if "attention" in terms:
                distance = attention_mse(student_BHTT, teacher_BHTT, token_weights, batch.mask_BT)
                terms["attention"] = terms["attention"] + distance
            # Neither matrix may outlive its layer.
            del teacher_BHTT, student_BHTT
        student_BTD = student_pass.finish(student_BTD)
        if "hidden" in terms and after_norm:
            with torch.no_grad():
                normed_BTD = teacher_pass.finish(teacher_BTD)
            distance = hidden_mse(student_BTD, normed_BTD, token_weights, self._normalised)
            terms["hidden"] = terms["hidden"] + distance
        return terms, student_BTD, self._end_of_teacher(batch, teacher_pass, teacher_BTD, done)

    def _student_alone(
        self, batch: TokenBatch, student_pass: LayerwisePass, teacher_pass: LayerwisePass
    ) -> tuple[Terms, Tensor, Tensor | TopK | None]:
        """Return what student and teacher end in; the teacher goes first, before the student holds memory."""
        student_BTD, teacher_BTD, first, done = self.enter(batch, student_pass, teacher_pass)
        teacher = self._end_of_teacher(batch, teacher_pass, teacher_BTD, done)
        del teacher_BTD
        for layer in self.pair.student_layers[first:]:
            student_BTD, _ = self.block(student_pass, layer, student_BTD)
        return {}, student_pass.finish(student_BTD), teacher

    def _end_of_teacher(
        self, batch: TokenBatch, teacher_pass: LayerwisePass, teacher_BTD: Tensor, done: int
    ) -> Tensor | TopK | None:
        """Return the teacher's state after the final norm or its most likely tokens; None if no term asks.

        Raises:
            RequestError: they are from a cache, and the loss needs what the cache does not hold.
        """
        last = self._loss.hidden and self._loss.hidden_layers == "last"
        if not (self._loss.logits or last):
            return None
        if batch.teacher_topk is not None:
            if last:
                raise RequestError(
                    "recovery.loss.hidden compares states, of which a cache of top-k probabilities holds "
                    "none; set it to 0, or use recovery.teacher_cache: hidden"
                )
            check_topk(self._loss.logit_loss, self._loss.temperature)
            return batch.teacher_topk
        if batch.teacher_BTD is not None:
            if self.teacher is None and not self._heads[1].frozen:
                raise RequestError(
                    "the teacher's state from a cache gives its logits by a head that is not trained, but "
                    "this recovery trains it; set recovery.teacher_cache to off"
                )
            return batch.teacher_BTD.to(teacher_BTD.dtype)
        if self._shared and self.pair.teacher_layers is None:
            raise RequestError("a student alone needs the teacher's states, but its batches bring none")
        teacher_BTD, _ = self.advance_teacher(teacher_pass, range(done, self._teacher_depth), teacher_BTD)
        with torch.no_grad():
            return teacher_pass.finish(teacher_BTD)

    def _logit_terms(
        self,
        batch: TokenBatch,
        student_BTD: Tensor,
        teacher: Tensor | TopK | None,
        token_weights: TokenWeights,
    ) -> tuple[Tensor, Terms]:
        """Return the weighted sum of the terms of logits and next tokens, and each of them for the log."""
        weights, predicted = self._weights, prediction_weights(batch)
        terms: Terms = {}
        # DeepSpeed's third stage gathers weights for modules, not for a kernel that takes them by themselves.
        sharded = self._fused_heads and any(hasattr(head, "ds_id") for head in self._fused_heads)
        if self._fused_heads and isinstance(teacher, Tensor) and not sharded:
            name, temperature = self._loss.logit_loss, self._loss.temperature
            distance = fused_logit_loss(
                name, student_BTD, teacher, self._fused_heads, temperature, token_weights
            )
            return weights["logits"] * distance, {"logits": distance}
        if self._loss.logits and self._gram_DD is None:
            assert teacher is not None
            targets_BT = next_ids(batch).masked_fill(predicted.weights_BT == 0, NO_TARGET)
            factor = weights["next_token"] / weights["logits"]
            total, sums = chunked_logit_loss(
                student_BTD,
                teacher,
                self._heads,
                self._distance,
                token_weights,
                (factor, targets_BT) if factor else None,
            )
            names = ("logits", "next_token") if factor else ("logits",)
            return weights["logits"] * total, dict(zip(names, sums, strict=True))
        if self._loss.logits:
            assert isinstance(teacher, Tensor)
            terms["logits"] = logit_mse_from_hidden(student_BTD, teacher, self._gram_DD, token_weights)
        if weights["next_token"]:
            summed = TokenWeights(predicted.weights_BT, denominator=1.0)
            total = next_token_cross_entropy(student_BTD, next_ids(batch), self._heads[0], summed)
            # All terms of a batch have one denominator.
            terms["next_token"] = token_weights.divided(total, batch.input_ids_BT.numel())
        total = sum((weights[name] * value for name, value in terms.items()), torch.tensor(0.0))
        return total, terms
