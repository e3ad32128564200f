"""The model's own stream, block by block, for measures that look at it and at nothing else.

As in `wavefront`, sequences of one length share a batch, nothing is padded, and all sequences of
a wave pass a block before the next one begins, so that its weights are read once a wave.

Shape letters: G sequences of one length, T tokens, D hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.models import LayerwisePass, depth, resident
from actors.models.offloading.dispatch import input_device
from actors.scoring.measures.memory_budget import Group, Wave
from actors.scoring.measures.wavefront import ForwardCounter

NO_BLOCK = -1
"""Stands for the block to read ahead where none follows."""


@dataclass(frozen=True)
class PassedBlock:
    """Sequences of one length that have passed a block.

    Attributes:
        index: of the block; its weights are there as long as this is the last one yielded.
        positions: of the sequences.
        entering_GTD: what the block received.
        leaving_GTD: what it gave, maybe on another device.
    """

    index: int
    positions: tuple[int, ...]
    entering_GTD: Tensor
    leaving_GTD: Tensor


def layerwise_pass(model: PreTrainedModel, sequences: Sequence[Tensor], group: Group) -> LayerwisePass:
    """Return the pass of a group of sequences; block 0 has to be resident when the first one is made."""
    ids_GT = torch.stack([sequences[i] for i in group.positions])
    return LayerwisePass(model, ids_GT.to(input_device(model)))


def take_hidden(layerwise: LayerwisePass) -> Tensor:
    """Return what enters block 0, which the pass then no longer keeps."""
    hidden_GTD = layerwise.hidden_BTD
    layerwise.hidden_BTD = hidden_GTD.new_empty(0)
    return hidden_GTD


@torch.no_grad()
def passed_blocks(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    waves: Sequence[Wave],
    counter: ForwardCounter,
    num_blocks: int | None = None,
) -> Iterator[PassedBlock]:
    """Yield every group of every wave after each block.

    Args:
        model: a decoder language model of N blocks; its weights may be streamed.
        sequences: token ids [T] of every sequence that the waves' positions refer to.
        waves: which sequences go together; their candidates do not matter.
        num_blocks: pass the first so many blocks only.
    """
    num_blocks = depth(model.config) if num_blocks is None else num_blocks
    for number, wave in enumerate(waves):
        after_last = 0 if number + 1 < len(waves) else NO_BLOCK
        passes: list[LayerwisePass] = []
        hidden: list[Tensor] = []
        for index in range(num_blocks):
            with resident(model, index, then=index + 1 if index + 1 < num_blocks else after_last):
                if index == 0:
                    passes = [layerwise_pass(model, sequences, group) for group in wave.groups]
                    hidden = [take_hidden(layerwise) for layerwise in passes]
                for g, group in enumerate(wave.groups):
                    entering_GTD, hidden[g] = hidden[g], passes[g].block(index, hidden[g])
                    counter.layer_forwards += len(group.positions)
                    yield PassedBlock(index, group.positions, entering_GTD, hidden[g])
