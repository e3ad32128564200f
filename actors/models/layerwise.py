"""Walking a batch through a model one block at a time, outside the family's own loop.

Scoring and distillation both need single blocks: to start a candidate in the
middle, or to keep a teacher and a student side by side. What each block is
called with (masks, rotary embeddings, windows) is the family's own business, so
it is captured from the family's own forward, run once with every block replaced
by a stand-in that only takes notes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.models.families import find_backbone, find_layers
from actors.models.offloading.dispatch import replaced_forward

StandIn = Callable[[int, Tensor], Tensor]

_NOT_CARRIED = object()
"""Stands for what a block returns beside the hidden states, which the walk does not carry on."""


class LayerwisePass:
    """One batch's way through a model, block by block.

    Args:
        model: a decoder language model of N blocks.
        input_ids_BT: token ids; every row as long as the others, no padding
            unless `attention_mask_BT` says where.
        attention_mask_BT: 1 for tokens, 0 for padding.
        position_ids_BT: positions within each document where rows hold several;
            no token then sees another document. The family must go by them: see
            `recovery.documents`.

    Attributes:
        hidden_BTD: what the first block receives (embeddings, scaled or with
            positions added as the family does).
        config: the model's configuration.

    Raises:
        RequestError: the family's blocks hand more on to the next one than the hidden states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
    ):
        layers = find_layers(model)
        self.config = model.config
        self._model, self._backbone, self._blocks = model, find_backbone(model), layers.modules
        self._inputs = {"input_ids": input_ids_BT, **_whom_to_see(attention_mask_BT, position_ids_BT)}
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._beside = _returned_beside(self._backbone, self._blocks[0], input_ids_BT[:1, :1])
        self.hidden_BTD = self._capture()

    def block(self, index: int, hidden_BTD: Tensor) -> Tensor:
        """Output of block `index` on `hidden_BTD`."""
        args, kwargs = self._calls[index]
        return _hidden_of(self._blocks[index](hidden_BTD, *args, **kwargs))

    def finish(self, hidden_BTD: Tensor) -> Tensor:
        """The last hidden state after the final norm, from the output of the last block."""
        with self._ending_in(hidden_BTD):
            return self._forward()

    def logits(self, hidden_BTD: Tensor, tokens_K: Tensor) -> Tensor:
        """The family's own logits [B, K, V] at those token indices, from the output of the last block."""
        takes_indices = "logits_to_keep" in signature(self._model.forward).parameters
        keep = {"logits_to_keep": tokens_K} if takes_indices else {}
        with self._ending_in(hidden_BTD):
            logits = self._model(**self._inputs, use_cache=False, **keep).logits
        return logits if takes_indices else logits[:, tokens_K]

    def _ending_in(self, hidden_BTD: Tensor) -> AbstractContextManager[None]:
        """The model computes as if its last block had given `hidden_BTD`."""
        last = len(self._blocks) - 1
        return self._stand_ins(lambda index, hidden: hidden_BTD if index == last else hidden)

    def _forward(self) -> Tensor:
        return self._backbone(**self._inputs, use_cache=False).last_hidden_state

    def _capture(self) -> Tensor:
        entered: list[Tensor] = []

        def note(index: int, hidden: Tensor) -> Tensor:
            if index == 0:
                entered.append(hidden)
            return hidden

        with self._stand_ins(note, capture=True):
            self._forward()
        return entered[0]

    @contextmanager
    def _stand_ins(self, compute: StandIn, capture: bool = False) -> Iterator[None]:
        """Replace every block's forward by `compute(index, hidden)`."""
        with ExitStack() as replaced:
            for index, block in enumerate(self._blocks):
                replaced.enter_context(replaced_forward(block, self._stand_in(index, compute, capture)))
            yield

    def _check_alone(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is _NOT_CARRIED for value in (*args, *kwargs.values())):
            block = type(self._blocks[0]).__name__
            raise RequestError(
                f"model type {self.config.model_type!r}: a block ({block}) goes on with more than the hidden "
                "states of the one before it, so that blocks cannot be run one by one; score by deepest, "
                "reverse, random, magnitude_l1, magnitude_l2 or task_metric"
            )

    def _stand_in(self, index: int, compute: StandIn, capture: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            if capture:
                self._check_alone(args, kwargs)
                self._calls.append((args, kwargs))
            output = compute(index, hidden)
            if self._beside is None:
                return output
            return (output, *(_NOT_CARRIED if capture and something else None for something in self._beside))

        return forward


def _whom_to_see(mask_BT: Tensor | None, position_ids_BT: Tensor | None) -> dict[str, Tensor | None]:
    """What tells the family which tokens see which.

    transformers keeps documents apart by their positions only where no mask is
    given, so padding becomes documents of one token each.
    """
    if position_ids_BT is None:
        return {"attention_mask": mask_BT}
    if mask_BT is not None:
        position_ids_BT = position_ids_BT * mask_BT.to(position_ids_BT.dtype)
    return {"attention_mask": None, "position_ids": position_ids_BT}


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


class _SeenEnoughError(Exception):
    """Ends a forward pass early."""


_RETURNED_BESIDE: dict[type[nn.Module], tuple[bool, ...] | None] = {}
"""What `_returned_beside` found for each class of block, so that it looks once a process."""


def _returned_beside(backbone: nn.Module, block: nn.Module, input_ids_BT: Tensor) -> tuple[bool, ...] | None:
    """What this family's loop expects from a block after the hidden states: whether each item is something.

    None if it expects a tensor rather than a tuple.

    Seen from one block on one token, the first time that a class of block is met.
    """
    if type(block) in _RETURNED_BESIDE:
        return _RETURNED_BESIDE[type(block)]

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        is_tuple = isinstance(output, (tuple, list))
        _RETURNED_BESIDE[type(block)] = tuple(item is not None for item in output[1:]) if is_tuple else None
        raise _SeenEnoughError

    hook = block.register_forward_hook(look)
    # Dropout in this one block must not move the draws of the pass that follows.
    devices = [input_ids_BT.device] if input_ids_BT.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            backbone(input_ids=input_ids_BT, use_cache=False)
    except _SeenEnoughError:
        pass
    finally:
        hook.remove()
    return _RETURNED_BESIDE[type(block)]
