"""Running a batch through a model one block at a time, outside the family's own loop.

Scoring and distillation both need single blocks: to start a candidate in the
middle, or to keep a teacher and a student side by side. The arguments
of each block (masks, rotary embeddings, windows) depend on the family, so they
are captured from the family's own forward, run once with every block replaced
by a stub that only records its arguments.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from inspect import signature
from typing import Any, cast
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from actors.errors import RequestError
from actors.models.families import depth, find_backbone, find_layers
from actors.models.offloading.dispatch import replaced_forward

BlockStub = Callable[[int, Tensor], Tensor]

_NOT_CARRIED = object()
"""Stands for what a block returns beside the hidden states, which is not passed to the next one."""


class LayerwisePass:
    """One batch's pass through a model, block by block.

    Args:
        model: a decoder language model of N blocks.
        input_ids_BT: token ids; every row as long as the others, no padding
            unless `attention_mask_BT` says where.
        attention_mask_BT: 1 for tokens, 0 for padding.
        position_ids_BT: positions within each document where rows hold several;
            no token then sees another document. The family must go by them: see
            `recovery.documents`.

    Attributes:
        hidden_BTD: input of the first block (embeddings, scaled or with
            positions added as the family does).
        config: the model's configuration.

    Raises:
        RequestError: the family's blocks pass more to the next one than the hidden states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
    ):
        self.config = model.config
        self._model = model
        self._backbone, self._blocks = _structure(model)
        self._inputs = {"input_ids": input_ids_BT, **_attention_inputs(attention_mask_BT, position_ids_BT)}
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._extra = _extra_outputs(self._backbone, self._blocks[0], input_ids_BT[:1, :1])
        entered: list[Tensor] = []

        def record(index: int, hidden: Tensor) -> Tensor:
            if index == 0:
                entered.append(hidden)
            return hidden

        with self._stubbed_blocks(record, capture=True):
            self._forward()
        self.hidden_BTD = entered[0]

    def block(self, index: int, hidden_BTD: Tensor) -> Tensor:
        """Return the output of block `index` on `hidden_BTD`, on the device of that."""
        args, kwargs = self._calls[index]
        output = self._blocks[index](hidden_BTD, *args, **kwargs)
        leaving_BTD = output[0] if isinstance(output, (tuple, list)) else output
        return leaving_BTD.to(hidden_BTD.device)

    def finish(self, hidden_BTD: Tensor) -> Tensor:
        """Return the last hidden state after the final norm, from the output of the last block."""
        with self._ending_in(hidden_BTD):
            return self._forward()

    def logits(self, hidden_BTD: Tensor, tokens_K: Tensor) -> Tensor:
        """Return the family's own logits [B, K, V] at those tokens, from the output of the last block."""
        takes_indices = "logits_to_keep" in signature(self._model.forward).parameters
        keep = {"logits_to_keep": tokens_K} if takes_indices else {}
        with self._ending_in(hidden_BTD):
            logits = self._model(**self._inputs, use_cache=False, **keep).logits
        return logits if takes_indices else logits[:, tokens_K]

    def _ending_in(self, hidden_BTD: Tensor) -> AbstractContextManager[None]:
        """Have the model compute as if its last block had returned `hidden_BTD`."""
        last = len(self._blocks) - 1
        return self._stubbed_blocks(lambda index, hidden: hidden_BTD if index == last else hidden)

    def _forward(self) -> Tensor:
        with _one_document_a_row() if self._inputs.get("position_ids") is None else nullcontext():
            return self._backbone(**self._inputs, use_cache=False).last_hidden_state

    @contextmanager
    def _stubbed_blocks(self, compute: BlockStub, capture: bool = False) -> Iterator[None]:
        """Replace every block's forward by `compute(index, hidden)`."""
        with ExitStack() as replaced:
            for index, block in enumerate(self._blocks):
                replaced.enter_context(replaced_forward(block, self._stub(index, compute, capture)))
            yield

    def _stub(self, index: int, compute: BlockStub, capture: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            if capture:
                if any(value is _NOT_CARRIED for value in (*args, *kwargs.values())):
                    block = type(self._blocks[0]).__name__
                    raise RequestError(
                        f"model type {self.config.model_type!r}: a block ({block}) goes on with more "
                        "than the hidden states of the one before it, so that blocks cannot be run one by "
                        "one; score by deepest, reverse, random, magnitude_l1, magnitude_l2 or task_metric"
                    )
                self._calls.append((args, kwargs))
            output = compute(index, hidden)
            if self._extra is None:
                return output
            return (output, *(_NOT_CARRIED if capture and something else None for something in self._extra))

        return forward


@contextmanager
def _one_document_a_row() -> Iterator[None]:
    """Spare transformers the search for documents in positions that it counts itself.

    It ends in a look at the device, for which the host waits, in every forward pass.
    """
    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


_STRUCTURES: WeakKeyDictionary[PreTrainedModel, tuple[int, str, ReferenceType[nn.Module], str]] = (
    WeakKeyDictionary()
)
"""Of models that passes were made through: depth, path of the blocks' parent, backbone, name of the list."""


def _structure(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """Return backbone and blocks; all modules are looked through once, and again when blocks were removed."""
    num_layers = depth(model.config)
    known = _STRUCTURES.get(model)
    if known is None or known[0] != num_layers:
        parent, _, name = find_layers(model).path.rpartition(".")
        known = _STRUCTURES[model] = num_layers, parent, ref(find_backbone(model)), name
    _, parent, backbone, name = known
    return cast(nn.Module, backbone()), getattr(model.get_submodule(parent), name)


def _attention_inputs(mask_BT: Tensor | None, position_ids_BT: Tensor | None) -> dict[str, Tensor | None]:
    """Return the inputs that decide which tokens attend to which.

    transformers keeps documents apart by their positions only where no mask is
    given, so padding becomes documents of one token each.
    """
    if position_ids_BT is None:
        return {"attention_mask": mask_BT}
    if mask_BT is not None:
        position_ids_BT = position_ids_BT * mask_BT.to(position_ids_BT.dtype)
    return {"attention_mask": None, "position_ids": position_ids_BT}


class _StopForwardError(Exception):
    """Ends a forward pass early."""


_EXTRA_OUTPUTS: dict[type[nn.Module], tuple[bool, ...] | None] = {}
"""Results of `_extra_outputs` by class of block, found once a process."""


def _extra_outputs(backbone: nn.Module, block: nn.Module, input_ids_BT: Tensor) -> tuple[bool, ...] | None:
    """Return which items after the hidden states this family's loop expects from a block; true for a value.

    None if it expects a tensor rather than a tuple.

    Seen from one block on one token, the first time that a class of block is met.
    """
    if type(block) in _EXTRA_OUTPUTS:
        return _EXTRA_OUTPUTS[type(block)]

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        is_tuple = isinstance(output, (tuple, list))
        _EXTRA_OUTPUTS[type(block)] = tuple(item is not None for item in output[1:]) if is_tuple else None
        raise _StopForwardError

    hook = block.register_forward_hook(look)
    # Dropout in this one block must not move the draws of the pass that follows.
    devices = [input_ids_BT.device] if input_ids_BT.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            backbone(input_ids=input_ids_BT, use_cache=False)
    except _StopForwardError:
        pass
    finally:
        hook.remove()
    return _EXTRA_OUTPUTS[type(block)]
