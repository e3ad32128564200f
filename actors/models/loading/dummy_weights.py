"""Copies of a model that have its modules but none of its weights: to try a family out in little memory."""

from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.models.families import find_layers
from actors.models.pruning.surgery import read_back, remove_layers, traits


def dummy_model(model: PreTrainedModel, draw: Callable[[torch.Size], Tensor]) -> PreTrainedModel:
    """Build the float32 model of `model`'s config, on the CPU, with parameters that `draw` gives by shape.

    They may overlap in memory: a view that repeats its values costs nothing.
    """
    config = read_back(model.config)
    config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        dummy = type(model)(config).eval()
    # The grouped matrix product of experts takes no weights that overlap.
    dummy.set_experts_implementation("eager")
    for module in dummy.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(draw(parameter.shape), requires_grad=False))
    return dummy


def overlapping_draws(seed: int = 0) -> Callable[[torch.Size], Tensor]:
    """Return a function that draws weights of any shape in the memory of a vector.

    A matrix is W_ij = v_{i+j} / √n with v drawn from N(0, 1) and n its columns: of full
    rank, and no two rows alike.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: torch.Size) -> Tensor:
        num_values = 1 + sum(size - 1 for size in shape)
        values = torch.randn(num_values, generator=generator)
        fan_in = shape[-1] if len(shape) > 1 else 1
        return (values / fan_in**0.5).as_strided(shape, [1] * len(shape))

    return draw


def keep_one_of_each_kind(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the blocks that another block is like in all but its weights, where the family can be pruned."""
    makes: dict[tuple[object, ...], int] = {}
    try:
        blocks = find_layers(model).modules
        for index, block in enumerate(blocks):
            makes.setdefault(tuple(sorted(traits(block))), index)
        repeated = sorted(set(range(len(blocks))) - set(makes.values()))
        return remove_layers(model, repeated) if repeated else model
    except RequestError:
        return model
