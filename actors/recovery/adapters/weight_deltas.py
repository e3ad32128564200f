"""Weights that differ from the source's, seen as changes that can be switched off with the adapters."""

import math
import re

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from actors.contracts import ArtifactRef, ModelRef
from actors.models import Deltas, depth, find_layers, read_weights, weight_shapes

LARGEST_SHARE = 0.25
"""Of a model's parameters: from there on, a second model is cheaper than changes to the first."""


def can_share_weights(source: PreTrainedModel, ref: ModelRef) -> bool:
    """Return whether the student of `ref` is best computed by the source and a few changes to it."""
    if ref.merges:
        return False
    if ref.weights is None:
        return True
    changed = 0
    for name, shape in weight_shapes(ref.weights).items():
        place = _linear_weight_of(source, name)
        if place is None:
            return False
        changed += 0 if place[0] in ref.dropped else math.prod(shape)
    return changed <= LARGEST_SHARE * source.num_parameters()


@torch.no_grad()
def weight_deltas(source: PreTrainedModel, weights: ArtifactRef, kept: tuple[int, ...]) -> Deltas:
    """Return W' − W of every linear weight of the kept layers, as LoRA factors A = W' − W and B = 1."""
    factors: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    transposed = False
    for name, tensor in read_weights(weights).items():
        place = _linear_weight_of(source, name)
        if place is None or place[0] not in kept:
            continue
        module_path = name.removesuffix(".weight")
        transposed = isinstance(source.get_submodule(module_path), Conv1D)
        delta = tensor.float() - source.get_parameter(name).float().cpu()
        delta = delta.T if transposed else delta
        factors[kept.index(place[0]), place[1]] = delta, torch.eye(len(delta))
    return Deltas(factors, 1.0, transposed)


def _linear_weight_of(source: PreTrainedModel, name: str) -> tuple[int, str] | None:
    """Return (source layer, name in the block) of a linear layer's weight; None for anything else."""
    match = re.fullmatch(rf"{re.escape(find_layers(source).path)}\.(\d+)\.(.+\.weight)", name)
    if match is None or int(match[1]) >= depth(source.config):
        return None
    linear = isinstance(source.get_submodule(name.removesuffix(".weight")), (nn.Linear, Conv1D))
    return (int(match[1]), match[2]) if linear else None
