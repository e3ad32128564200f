"""Removal of the attention or the MLP of single blocks, by setting its parameters to zero.

transformers has no config that leaves out half a block, so a checkpoint that opens
without code of ours keeps the sub-block's place, filled with zeros: it then adds
exactly nothing to the residual stream. The function is that of the smaller model;
the size in memory and on disk is not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from actors.contracts import BLOCK
from actors.errors import RequestError, unknown_name
from actors.models.families import check_layers_apart, find_layers, text_config
from actors.models.layerwise import LayerwisePass
from actors.models.loading.dummy_weights import dummy_model, zeros
from actors.models.offloading.dispatch import loaded_weights
from actors.models.pruning.surgery import check_reads_back, remaining, traits

SUB_BLOCKS: dict[str, tuple[str, ...]] = {
    "attention": (
        "self_attn", "self_attention", "attn", "attention", "self_att", "multi_head_attention", "rel_attn",
        "attention.self", "attention.output.dense", "norm_attn_norm.attn",
        "linear_attn", "mamba", "conv", "temporal_block", "mlstm_layer",
    ),
    "mlp": (
        "mlp", "mlps", "feed_forward", "ffn", "ff", "mlp_block", "block_sparse_moe", "shared_mlp",
        "fc1", "fc2", "intermediate", "output.dense",
    ),
}  # fmt: skip
"""Paths of sub-blocks in a block, by family. `attention` is what mixes tokens: in hybrids also a state-space
layer, a convolution or linear attention. Several of a kind are taken together; of nested ones the inner."""

GRANULARITIES = (BLOCK, *SUB_BLOCKS)
"""Parts that are removed: whole blocks, or one kind of sub-block."""


def check_granularity(name: str) -> None:
    """Raise RequestError unless `name` is one of `GRANULARITIES`."""
    if name not in GRANULARITIES:
        raise unknown_name("granularity", name, GRANULARITIES)


def sub_block_paths(block: nn.Module, kind: str) -> list[str]:
    """Return the paths of the block's attention or MLP; none if it has no such part."""
    known = {path for path, _ in block.named_modules()}
    paths = [path for path in SUB_BLOCKS[kind] if path in known]
    return [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]


def sub_block_weights(block: nn.Module, kind: str) -> dict[str, nn.Parameter]:
    """Return the parameters of the block's attention or MLP, by their names in the block."""
    return {
        f"{path}.{name}": parameter
        for path in sub_block_paths(block, kind)
        for name, parameter in block.get_submodule(path).named_parameters()
    }


def check_sub_blocks(model: PreTrainedModel, kind: str) -> None:
    """Check that every block has a sub-block of that kind, so that it can be scored without it.

    Raises:
        RequestError: a block has none.
    """
    for index, block in enumerate(find_layers(model).modules):
        if not sub_block_weights(block, kind):
            parts = ", ".join(name for name, _ in block.named_children())
            raise RequestError(
                f"model type {model.config.model_type!r}: layer {index} has no {kind} of its own (it holds "
                f"{parts}); remove whole blocks (granularity: block)"
            )


def zero_sub_blocks(model: PreTrainedModel, kind: str, layers: Sequence[int]) -> PreTrainedModel:
    """Set the attention or the MLP of some blocks to zero in place and return the model.

    Saved and loaded by plain transformers it computes what `model` computes when
    those sub-blocks add nothing. No parameter goes away.

    Args:
        model: a decoder language model of N blocks.
        kind: a name in `SUB_BLOCKS`.
        layers: indices of the blocks, in `model` as given, 0..N-1.

    Raises:
        RequestError: an index out of range or repeated, nothing left, or a family
            whose blocks do not hand the stream on unchanged without their sub-blocks.
    """
    remaining(len(find_layers(model).modules), layers)
    check_zeroable(model, kind)
    blocks = find_layers(model).modules
    with torch.no_grad():
        for layer in layers:
            for parameter in sub_block_weights(blocks[layer], kind).values():
                parameter.zero_()
    return model


@contextmanager
def without_sub_block(block: nn.Module, kind: str) -> Iterator[None]:
    """Have the block compute as if the sub-block's parameters were zero."""
    with loaded_weights(block):
        weights = sub_block_weights(block, kind).values()
        kept = [parameter.data for parameter in weights]
        for parameter in weights:
            parameter.data = torch.zeros_like(parameter.data)
        try:
            yield
        finally:
            for parameter, data in zip(weights, kept, strict=True):
                parameter.data = data


def check_zeroable(model: PreTrainedModel, kind: str) -> None:
    """Check that zeros in a sub-block take it out of the residual stream, on one block of each make.

    Only the config and the modules of `model` are used. In a copy whose sub-blocks
    are all zero and whose other weights are drawn at random, a block must hand on
    exactly what it receives. Where a norm follows that shifts or rescales the
    stream, where weights of experts are skipped or streams are mixed, it does not.

    Raises:
        RequestError: says which layer does not, or has no such sub-block.
    """
    check_sub_blocks(model, kind)
    check_layers_apart(text_config(model.config), range(len(find_layers(model).modules)))
    check_reads_back(model.config, {})
    dummy = dummy_model(model, zeros)
    layerwise = LayerwisePass(dummy, torch.zeros(1, 3, dtype=torch.long))
    blocks = find_layers(dummy).modules
    seen = set()
    for index, block in enumerate(blocks):
        if (make := tuple(sorted(traits(block)))) in seen:
            continue
        seen.add(make)
        inside = {name for part in SUB_BLOCKS for name in sub_block_weights(block, part)}
        generator = torch.Generator().manual_seed(0)
        for path, module in block.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if f"{path}.{name}".lstrip(".") not in inside:
                    drawn = torch.randn(parameter.shape, generator=generator)
                    module.register_parameter(name, nn.Parameter(drawn, requires_grad=False))
        received = torch.randn(layerwise.hidden_BTD.shape, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            given = layerwise.block(index, received)
        if not torch.equal(given, received):
            raise RequestError(
                f"model type {model.config.model_type!r}: layer {index} ({type(block).__name__}) changes the "
                "residual stream even without attention and MLP, so that no checkpoint can leave out its "
                f"{kind} alone; remove whole blocks (granularity: block)"
            )
