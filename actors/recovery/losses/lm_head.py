"""The LM head: from hidden states to logits, and whether those are one frozen matrix product.

One probe through the family's own head shows whether the shortcut through WᵀW is exact.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.models import device
from actors.models.head import LogitHead
from actors.recovery.losses.logit_losses import gram_matrix

PROBE_LOGIT = 1000.0
PROBE_TOLERANCE = 0.02


class LMHead(LogitHead):
    """The head of a causal language model.

    Attributes:
        frozen: whether nothing between hidden states and logits is trained.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        below = {id(parameter) for parameter in model.base_model.parameters()}
        above = [parameter for parameter in model.parameters() if id(parameter) not in below]
        self.frozen = not any(p.requires_grad for p in (*above, *model.get_output_embeddings().parameters()))

    def matrix(self) -> Tensor | None:
        """Return W [V, D] where the logits are exactly W h with W frozen, else None."""
        layer = self._model.get_output_embeddings()
        if not self.frozen or not is_plain_head(layer) or not self._is_product(layer.weight):
            return None
        return layer.weight

    @torch.no_grad()
    def _is_product(self, weight_VD: Tensor) -> bool:
        """Return whether logits equal W h on one hidden vector that makes a logit large.

        Scales show at once, soft caps because the logit is far above any of them.
        """
        longest_D = weight_VD[weight_VD.float().norm(dim=1).argmax()].float()
        hidden_1D = (PROBE_LOGIT * longest_D / longest_D.square().sum())[None].to(weight_VD.dtype)
        logits, product = self(hidden_1D).float(), hidden_1D.float() @ weight_VD.float().T
        return bool((logits - product).abs().max() < PROBE_TOLERANCE * PROBE_LOGIT)


def common_gram(student: LMHead, teacher: LMHead) -> Tensor | None:
    """Return `gram_matrix` where both heads are the same frozen matrix and nothing else, else None."""
    ours, theirs = student.matrix(), teacher.matrix()
    if ours is None or theirs is None or ours.shape != theirs.shape or not torch.equal(ours, theirs):
        return None
    return gram_matrix(ours, device())


def is_plain_head(layer: nn.Module | None) -> bool:
    """Return whether the head is one frozen matrix: linear, without bias, not trained."""
    return isinstance(layer, nn.Linear) and layer.bias is None and not layer.weight.requires_grad
