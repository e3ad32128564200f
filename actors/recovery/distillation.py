"""Lockstep distillation: teacher and student side by side on one copy of the weights.

IteRABRe §3.2, with map(l) as corrected in DESIGN §6:
L = Σ_l [ MSE(H_T^{map(l)}, H_S^l) + MSE(A_T^{map(l)}, A_S^l) ] + MSE(z_T, z_S).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from actors.contracts import LossSpec
from actors.data import TokenBatch
from actors.errors import RequestError
from actors.models import LayerwisePass, find_layers
from actors.recovery.adapters import lora_layers, switched_off
from actors.recovery.attention import AttentionTap
from actors.recovery.head import OutputHead
from actors.recovery.losses import attention_mse, hidden_mse, logit_mse, logit_mse_from_hidden
from actors.recovery.pair import Pair

Terms = dict[str, Tensor]


class LockstepDistiller(nn.Module):
    """The unpruned model as its own teacher.

    The teacher is all N layers with adapters off; the student is the kept layers
    with adapters on. Both advance through the same modules, source layer by
    source layer, so the frozen weights exist once and only one teacher hidden
    state and attention matrix is alive at a time.

    Args:
        pair: student and teacher in one model.
        weights: weight of each loss term; a term of weight 0 is not computed.

    Raises:
        RequestError: no term has a weight, or the family has no attention
            matrices although the attention term is on.
    """

    def __init__(self, pair: Pair, weights: LossSpec):
        super().__init__()
        self.pair = pair
        self._model = pair.student
        self._kept = frozenset(pair.student_layers)
        self._weights = {"hidden": weights.hidden, "attention": weights.attention, "logits": weights.logits}
        if not any(self._weights.values()):
            raise RequestError("every loss term of the distillation has weight 0; give one of them a weight")
        blocks = find_layers(self._model).modules
        self._lora = [lora_layers(block) for block in blocks]
        self._tap = AttentionTap(self._model) if weights.attention else None
        self._head = OutputHead(self._model)
        self.register_buffer("_gram_DD", self._head.gram() if weights.logits else None, persistent=False)

    def train(self, mode: bool = True) -> "LockstepDistiller":
        """Only the adapters' own dropout follows the mode: the shared weights serve the teacher too."""
        super().train(False)
        self.training = mode
        for layer in (layer for block in self._lora for layer in block):
            layer.lora_dropout.train(mode)
        return self

    def forward(self, batch: TokenBatch) -> Terms:
        """Loss terms of one batch, and their weighted sum as `loss`.

        Returns:
            Scalars: `hidden` and `attention` are sums over the student's layers
            of means (see `losses`), `logits` is a mean; only terms with a weight.
        """
        mask_BT = batch.mask_BT
        way = LayerwisePass(self._model, batch.input_ids_BT, mask_BT)
        student_BTD, teacher_BTD, terms = self._advance(way, mask_BT)
        if self._weights["logits"]:
            with torch.no_grad():
                teacher_BTD = way.finish(teacher_BTD)
            terms["logits"] = self._logit_term(way.finish(student_BTD), teacher_BTD, mask_BT)
        terms["loss"] = sum((self._weights[name] * value for name, value in terms.items()), torch.tensor(0.0))
        return terms

    def student_hidden(self, input_ids_BT: Tensor) -> Tensor:
        """The student's last hidden state after the final norm [B, T, D]."""
        way = LayerwisePass(self._model, input_ids_BT)
        hidden_BTD = way.hidden_BTD
        for layer in sorted(self._kept):
            hidden_BTD = way.block(layer, hidden_BTD)
        return way.finish(hidden_BTD)

    def _advance(self, way: LayerwisePass, mask_BT: Tensor | None) -> tuple[Tensor, Tensor, Terms]:
        """Run both through all layers; their last hidden states and the terms summed on the way."""
        student_BTD = teacher_BTD = way.hidden_BTD
        terms: Terms = {name: torch.zeros((), device=student_BTD.device) for name in self._layer_terms}
        for layer in range(len(self._lora)):
            with torch.no_grad(), switched_off(self._lora[layer]), self._watching(layer):
                teacher_BTD = way.block(layer, teacher_BTD)
            if layer not in self._kept:
                continue
            teacher_BHTT = self._tap.take() if self._tap else None
            with self._watching(layer):
                student_BTD = way.block(layer, student_BTD)
            if "hidden" in terms:
                terms["hidden"] = terms["hidden"] + hidden_mse(student_BTD, teacher_BTD, mask_BT)
            if self._tap:
                distance = attention_mse(self._tap.take(), teacher_BHTT, mask_BT)
                terms["attention"] = terms["attention"] + distance
        return student_BTD, teacher_BTD, terms

    @property
    def _layer_terms(self) -> list[str]:
        return [name for name in ("hidden", "attention") if self._weights[name]]

    def _watching(self, layer: int) -> AbstractContextManager[None]:
        return self._tap.watching(layer) if self._tap else nullcontext()

    def _logit_term(self, student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        if self._gram_DD is None:
            return logit_mse(student_BTD, teacher_BTD, self._head, mask_BT)
        return logit_mse_from_hidden(student_BTD.float() - teacher_BTD.float(), self._gram_DD, mask_BT)
