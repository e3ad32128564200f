"""From final hidden states to logits, the way the family itself does it.

Most families compute z = W h; some scale or soft-cap. Nothing is assumed: the
family's own forward is run with its backbone replaced, and one probe tells
whether the shortcut through WᵀW is exact.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from actors.recovery.losses import gram_matrix

PROBE_LOGIT = 1000.0
PROBE_TOLERANCE = 0.02


class _OnlyHidden(BaseModelOutputWithPast):
    """A backbone's output in which all that a family might ask for besides is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class OutputHead:
    """Callable: hidden states after the final norm [.., D] → logits [.., V].

    Args:
        model: a causal language model.

    Attributes:
        frozen: whether nothing between hidden states and logits is trained.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        below = {id(parameter) for parameter in model.base_model.parameters()}
        above = [parameter for parameter in model.parameters() if id(parameter) not in below]
        self.frozen = not any(p.requires_grad for p in (*above, *model.get_output_embeddings().parameters()))

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden_BTD = hidden if hidden.dim() == 3 else hidden[None]
        token_ids_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.long, device=hidden.device)
        backbone = self._model.base_model

        def give_hidden(*_args: Any, **_kwargs: Any) -> _OnlyHidden:
            return _OnlyHidden(last_hidden_state=hidden_BTD)

        backbone.forward = give_hidden
        try:
            logits_BTV = self._model(input_ids=token_ids_BT, use_cache=False).logits
        finally:
            del backbone.forward
        return logits_BTV if hidden.dim() == 3 else logits_BTV[0]

    def matrix(self) -> Tensor | None:
        """W [V, D] where the logits are exactly W h with W frozen, else None."""
        layer = self._model.get_output_embeddings()
        if not self.frozen or not is_plain_head(layer) or not self._is_product(layer.weight):
            return None
        return layer.weight

    @torch.no_grad()
    def _is_product(self, weight_VD: Tensor) -> bool:
        """Whether logits equal W h, seen on one hidden vector that makes a logit large.

        Scales show at once, soft caps because the logit is far above any of them.
        """
        longest_D = weight_VD[weight_VD.float().norm(dim=1).argmax()].float()
        hidden_1D = (PROBE_LOGIT * longest_D / longest_D.square().sum())[None].to(weight_VD.dtype)
        logits, product = self(hidden_1D).float(), hidden_1D.float() @ weight_VD.float().T
        return bool((logits - product).abs().max() < PROBE_TOLERANCE * PROBE_LOGIT)


def common_gram(student: OutputHead, teacher: OutputHead) -> Tensor | None:
    """G of DESIGN §6 where both heads are the same frozen matrix and nothing else, else None."""
    ours, theirs = student.matrix(), teacher.matrix()
    if ours is None or theirs is None or ours.shape != theirs.shape or not torch.equal(ours, theirs):
        return None
    return gram_matrix(ours)


def is_plain_head(layer: nn.Module | None) -> bool:
    """Whether the head is one frozen matrix: linear, without bias, not trained."""
    return isinstance(layer, nn.Linear) and layer.bias is None and not layer.weight.requires_grad
