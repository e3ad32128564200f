"""Logits from final hidden states, by the family's own forward.

Most families compute z = W h; some scale or soft-cap. Nothing is assumed: the
family's own forward is run with its backbone replaced.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from actors.models.families import find_backbone
from actors.models.offloading.dispatch import replaced_forward


class _OnlyHidden(BaseModelOutputWithPast):
    """A backbone's output in which all other fields that a family might read are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class LogitHead:
    """Callable: hidden states after the final norm [.., D] → logits [.., V].

    Args:
        model: a causal language model.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden_BTD = hidden if hidden.dim() == 3 else hidden[None]
        token_ids_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.long, device=hidden.device)

        def give_hidden(*_args: Any, **_kwargs: Any) -> _OnlyHidden:
            return _OnlyHidden(last_hidden_state=hidden_BTD)

        with replaced_forward(find_backbone(self._model), give_hidden):
            logits_BTV = self._model(input_ids=token_ids_BT, use_cache=False).logits
        return logits_BTV if hidden.dim() == 3 else logits_BTV[0]
