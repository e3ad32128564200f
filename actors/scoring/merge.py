"""Layer collapse (LaCo, arXiv 2402.11187, Algorithm 1): merge from the top down while the output holds.

The model runs as a whole once, before anything is merged. A merge that is tried runs
only the merged block and those above it: what the block receives does not change,
as merging goes downwards.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.models import LayerwisePass, depth, find_layers, remove_layers
from actors.models.merge import merge_into
from actors.scoring.criteria import POOLING


@dataclass(frozen=True)
class Merge:
    """An accepted merge, in layer indices of the model as it was before any.

    Attributes:
        base: the layer that stays.
        merged: the layers that went into it, ascending.
        cosine: similarity of the last hidden states of the model after this merge and the unmerged one.
    """

    base: int
    merged: tuple[int, ...]
    cosine: float


@torch.no_grad()
def laco_compress(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    *,
    threshold: float,
    group: int = 4,
    interval: int = 2,
    lowest: int = 0,
    highest: int | None = None,
    min_layers: int = 1,
    variant: str = "differences",
    pooling: str = "flatten",
) -> list[Merge]:
    """Collapse the layers of `model` in place; return the merges that were accepted, in order.

    From `highest` − `group` downwards, each layer tries to take in the `group` − 1 layers
    after it. The merge stays if the mean cosine to the unmerged model's last hidden states
    is above `threshold`; the next try is then `interval` layers lower, else one.

    Args:
        model: a decoder language model of N blocks, in eval mode.
        sequences: token ids [T] each, without padding.
        threshold: T of Algorithm 1, in -1..1.
        group: C, layers that become one.
        interval: I, least distance of two accepted bases.
        lowest: L, the lowest layer that may take others in.
        highest: H, N if not given.
        min_layers: no merge leaves fewer.
        variant: `differences` (Eq. 1) or `in_place` (the published code).
        pooling: how tokens become one similarity; `flatten` in the published code.

    Raises:
        RequestError: a setting out of range, or blocks that cannot be merged.
    """
    num_layers = depth(model.config)
    highest = num_layers if highest is None else highest
    _check(group, interval, lowest, highest, num_layers)
    probes = [_Probe(model, sequence) for sequence in sequences]
    source, accepted = list(range(num_layers)), []
    base = highest - group
    while base >= lowest:
        left = len(source)
        count = min(group - 1, left - base - 1, left - min_layers)
        if count < 1:
            base -= 1
            continue
        with _tried(model, base, count, variant) as trial:
            cosine = mean(probe.similarity(model, base, count, pooling) for probe in probes)
            trial.keep = cosine > threshold
        if not trial.keep:
            base -= 1
            continue
        remove_layers(model, range(base + 1, base + count + 1))
        accepted.append(Merge(source[base], tuple(source[base + 1 : base + count + 1]), cosine))
        del source[base + 1 : base + count + 1]
        base = min(base - interval, len(source) - group)
    return accepted


def _check(group: int, interval: int, lowest: int, highest: int, num_layers: int) -> None:
    if group < 2 or interval < 1:
        raise RequestError(f"group is {group} and interval {interval}; at least 2 and 1 are needed")
    if not 0 <= lowest < highest <= num_layers:
        raise RequestError(
            f"lowest is {lowest} and highest {highest}; 0 ≤ lowest < highest ≤ {num_layers} is needed"
        )


@dataclass
class _Trial:
    keep: bool = False


@contextmanager
def _tried(model: PreTrainedModel, base: int, count: int, variant: str) -> Iterator[_Trial]:
    """Block `base` with the merged weights; they go back to what they were unless the trial is kept."""
    trial, block = _Trial(), find_layers(model).modules[base]
    before = [parameter.clone() for parameter in block.parameters()]
    merge_into(model, base, count, variant)
    try:
        yield trial
    finally:
        if not trial.keep:
            for parameter, value in zip(block.parameters(), before, strict=True):
                parameter.copy_(value)


class _Probe:
    """A sequence, what each block of the unmerged model receives for it, and what that model answers."""

    def __init__(self, model: PreTrainedModel, sequence_T: Tensor):
        walk = LayerwisePass(model, sequence_T[None])
        self._sequence_T, self._received = sequence_T, [walk.hidden_BTD]
        for index in range(depth(model.config)):
            self._received.append(walk.block(index, self._received[-1]))
        self._want_TD = walk.finish(self._received.pop())[0].float()

    def similarity(self, model: PreTrainedModel, base: int, count: int, pooling: str) -> float:
        """Cosine of the last hidden states without the `count` blocks after `base`; none below was merged."""
        walk = LayerwisePass(model, self._sequence_T[None])
        hidden = walk.block(base, self._received[base])
        for index in range(base + count + 1, depth(model.config)):
            hidden = walk.block(index, hidden)
        return POOLING[pooling](self._want_TD, walk.finish(hidden).float()).item()
