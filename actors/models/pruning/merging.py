"""Merging blocks that follow one another into one (LaCo, arXiv 2402.11187, §2).

θ*_l = θ_l + Σ_k (θ_{l+k} − θ_l), k = 1..m, after which the blocks l+1..l+m are removed.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from actors.contracts import Merge
from actors.errors import RequestError, unknown_name
from actors.models.families import find_layers
from actors.models.pruning.surgery import remove_layers


@torch.no_grad()
def differences(base: nn.Module, following: Sequence[nn.Module]) -> None:
    """Add the differences to the base as it was, over all parameters of the block (Eq. 1)."""
    parameters = [dict(block.named_parameters()) for block in following]
    for name, value in base.named_parameters():
        original = value.clone()
        for other in parameters:
            value += other[name].to(value.device) - original


@torch.no_grad()
def in_place(base: nn.Module, following: Sequence[nn.Module]) -> None:
    """Add each difference to the base as the last one left it, projections only, as the published code does.

    So the sum collapses: what is left are the projections of the last of `following`
    with the norms of the base.
    """
    last = dict(following[-1].named_parameters())
    for path, module in base.named_modules():
        # A projection holds a matrix of its own, a norm does not.
        if any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False)):
            for name, value in module.named_parameters(recurse=False):
                value.copy_(last[f"{path}.{name}".lstrip(".")])


MERGES: dict[str, Callable[[nn.Module, Sequence[nn.Module]], None]] = {
    "differences": differences,
    "in_place": in_place,
}
"""Ways to merge a block with those that follow it: the paper's Eq. 1, and its published code's."""


def merge_blocks(model: PreTrainedModel, merges: Iterable[Merge]) -> None:
    """Give each merge's base block its merged weights, in order; the merged blocks stay where they are.

    Raises:
        RequestError: an unknown variant, no such blocks, or blocks of different kinds.
    """
    blocks = find_layers(model).modules
    for merge in merges:
        if merge.variant not in MERGES:
            raise unknown_name("merge", merge.variant, MERGES)
        if not merge.merged or not all(0 <= i < len(blocks) for i in (merge.base, *merge.merged)):
            raise RequestError(
                f"cannot merge layers {list(merge.merged)} into {merge.base}: "
                f"the model has layers 0 to {len(blocks) - 1}"
            )
        for index in merge.merged:
            base, other = (
                {name: tuple(p.shape) for name, p in blocks[i].named_parameters()}
                for i in (merge.base, index)
            )
            if unlike := sorted(n for n in base.keys() | other.keys() if base.get(n) != other.get(n)):
                raise RequestError(
                    f"layers {merge.base} and {index} are of different kinds and cannot be merged: "
                    f"{unlike[0]!r} has shape {base.get(unlike[0])} in one and {other.get(unlike[0])} in the "
                    "other"
                )
        MERGES[merge.variant](blocks[merge.base], [blocks[i] for i in merge.merged])


def merge_layers(
    model: PreTrainedModel, base: int, count: int, variant: str = "differences"
) -> PreTrainedModel:
    """Merge the `count` blocks after block `base` into it, in place, and return `model`.

    Args:
        model: a decoder language model of N blocks; afterwards N - `count`.
        base: index of the block that stays, in `model` as given.
        count: how many of the following blocks go into it.
        variant: a name in `MERGES`.

    Raises:
        RequestError: as `merge_blocks` and `remove_layers`.
    """
    merged = tuple(range(base + 1, base + count + 1))
    merge_blocks(model, [Merge(base, merged, variant)])
    return remove_layers(model, merged)
