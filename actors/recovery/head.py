"""Whether a family's logits are its head's matrix times the hidden state, and nothing more.

One probe through the family's own head tells whether the shortcut through WᵀW is exact.
"""

import torch
from torch import Tensor, nn

from actors.models.head import LogitHead
from actors.recovery.losses import gram_matrix

PROBE_LOGIT = 1000.0
PROBE_TOLERANCE = 0.02


class OutputHead(LogitHead):
    """The head of a causal language model, frozen."""

    def gram(self) -> Tensor | None:
        """G of DESIGN §6 where the logits are exactly W h with W frozen, else None."""
        layer = self._model.get_output_embeddings()
        if not is_plain_head(layer) or not self._is_product(layer.weight):
            return None
        return gram_matrix(layer.weight)

    @torch.no_grad()
    def _is_product(self, weight_VD: Tensor) -> bool:
        """Whether logits equal W h, seen on one hidden vector that makes a logit large.

        Scales show at once, soft caps because the logit is far above any of them.
        """
        longest_D = weight_VD[weight_VD.float().norm(dim=1).argmax()].float()
        hidden_1D = (PROBE_LOGIT * longest_D / longest_D.square().sum())[None].to(weight_VD.dtype)
        logits, product = self(hidden_1D).float(), hidden_1D.float() @ weight_VD.float().T
        return bool((logits - product).abs().max() < PROBE_TOLERANCE * PROBE_LOGIT)


def is_plain_head(layer: nn.Module | None) -> bool:
    """Whether the head is one frozen matrix: linear, without bias, not trained."""
    return isinstance(layer, nn.Linear) and layer.bias is None and not layer.weight.requires_grad
