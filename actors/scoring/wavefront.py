"""All candidate removals in one walk through the layers (DESIGN §5, Wavefront).

At layer j the batch holds the unpruned stream and one stream for every candidate
i < j, which left it when its layer was skipped. Candidate j joins after layer j
with the unpruned *input* of layer j. A candidate's shared prefix is therefore
never computed again: N(N+1)/2 layer-forwards instead of N².
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.models import LayerwisePass, depth, find_layers


@torch.no_grad()
def last_hidden(model: PreTrainedModel, sequence_T: Tensor) -> Tensor:
    """The last hidden state [T, D] after the final norm; the LM head is not run."""
    backbone = find_layers(model).parent
    return backbone(input_ids=sequence_T[None], use_cache=False).last_hidden_state[0]


@torch.no_grad()
def candidate_hidden(model: PreTrainedModel, sequence_T: Tensor) -> Tensor:
    """The last hidden state of the model and of every model with one layer less.

    Args:
        model: a decoder language model of N blocks.
        sequence_T: token ids of one sequence; no padding.

    Returns:
        [1 + N, T, D] after the final norm: row 0 is the model itself, row 1 + i
        the model without block i.
    """
    streams = LayerwisePass(model, sequence_T[None]).hidden_BTD
    for index in range(depth(model.config)):
        walk = LayerwisePass(model, sequence_T.expand(len(streams), -1))
        unpruned_input = streams[:1]
        streams = torch.cat([walk.block(index, streams), unpruned_input])
    return LayerwisePass(model, sequence_T.expand(len(streams), -1)).finish(streams)


def layer_forwards(num_layers: int, num_sequences: int) -> int:
    """How many times a sequence passes a block in `candidate_hidden` over all sequences."""
    return num_sequences * num_layers * (num_layers + 1) // 2
