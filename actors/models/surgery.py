"""Removing whole transformer blocks from a loaded model."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from actors.errors import RequestError
from actors.models.families import depth, find_layers, kept_fields, text_config

OWN_INDEX = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
"""Attributes in which a block keeps its own index; the KV cache is addressed by it."""


def remove_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Drop blocks from `model` in place and return it.

    The result, saved and loaded by plain transformers, computes what `model`
    computes with those blocks skipped (DESIGN §4). Everything is checked before
    anything is changed.

    Args:
        model: a decoder language model of N blocks.
        layers: indices of the blocks to drop, in `model` as given, 0..N-1.

    Raises:
        RequestError: an index out of range or repeated, no block left, or a
            family whose config cannot express the result (names the field).
    """
    block_list = find_layers(model)
    blocks = list(block_list.modules)
    kept = remaining(len(blocks), layers)
    config = pruned_config(model.config, kept)
    _check_rebuilds(model, config, kept)
    for new_index, old_index in enumerate(kept):
        _renumber(blocks[old_index], old_index, new_index)
    setattr(block_list.parent, block_list.attribute, nn.ModuleList(blocks[i] for i in kept))
    _adopt(model, config)
    return model


def remaining(num_layers: int, dropped: Sequence[int]) -> list[int]:
    """Indices that stay when `dropped` go, ascending.

    Raises:
        RequestError: an index outside 0..num_layers-1 or repeated, or nothing stays.
    """
    outside = [i for i in dropped if not 0 <= i < num_layers]
    if outside:
        raise RequestError(f"no layer {outside[0]}: the model has layers 0 to {num_layers - 1}")
    if len(set(dropped)) != len(dropped):
        raise RequestError(f"a layer is listed twice among those to drop: {sorted(dropped)}")
    kept = sorted(set(range(num_layers)) - set(dropped))
    if not kept:
        raise RequestError(f"dropping all {num_layers} layers leaves no model; keep at least one")
    return kept


def pruned_config(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """A copy of `config` that describes the model with only the blocks `kept`."""
    pruned = copy.deepcopy(config)
    inner = text_config(pruned)
    for name, value in kept_fields(inner, kept).items():
        _set_field(inner, name, value)
    _set_field(inner, "num_hidden_layers", len(kept))
    return pruned


def _set_field(config: PretrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except AttributeError as error:
        raise RequestError(
            f"model type {config.model_type!r}: config field {name!r} is computed and cannot be set "
            "for a pruned model; this family cannot be pruned"
        ) from error


def _check_rebuilds(model: PreTrainedModel, config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Refuse unless a model built afresh from `config` has exactly the kept blocks.

    Blocks are compared without weights (on the meta device): their modules,
    parameter shapes and plain attributes. This finds every rule that a family
    derives from a block's own index (patterns, periods, scales), by name. So
    are the shapes outside the blocks, where some families hold a part for each
    block (per-layer embeddings).
    """
    with torch.device("meta"):
        rebuilt = type(model)(copy.deepcopy(config))
    blocks, rebuilt_blocks = find_layers(model).modules, find_layers(rebuilt).modules
    for new_index, old_index in enumerate(kept):
        change = _first_change(_traits(blocks[old_index]), _traits(rebuilt_blocks[new_index]))
        if change:
            raise RequestError(
                f"model type {config.model_type!r}: its config cannot say that layer {old_index} becomes "
                f"layer {new_index}: {change}"
            )
    change = _first_change(_shapes_outside_blocks(model), _shapes_outside_blocks(rebuilt))
    if change:
        raise RequestError(
            f"model type {config.model_type!r} holds a part for each layer outside its blocks, "
            f"so that it cannot be pruned: {change}"
        )


def _first_change(want: Iterable[tuple[str, Any]], got: Iterable[tuple[str, Any]]) -> str | None:
    """The first name, in order of the alphabet, whose value differs, in words."""
    before, after = dict(want), dict(got)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            return f"{name!r} would change from {before.get(name)!r} to {after.get(name)!r}"
    return None


def _shapes_outside_blocks(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    inside = f"{find_layers(model).path}."
    for name, parameter in model.named_parameters():
        if not name.startswith(inside):
            yield f"{name}:shape", tuple(parameter.shape)


def _traits(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and values that tell one block from another, leaving out weights and its own index."""
    for path, module in block.named_modules():
        yield f"{path}:class", type(module).__name__
        for name, value in vars(module).items():
            told = isinstance(value, (bool, int, float, str)) and not name.startswith("_")
            if told and name not in OWN_INDEX and name != "training":
                yield f"{path}.{name}".lstrip("."), value
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{name}:shape", tuple(parameter.shape)


def _renumber(block: nn.Module, old_index: int, new_index: int) -> None:
    for module in block.modules():
        for name in OWN_INDEX:
            if getattr(module, name, None) == old_index:
                setattr(module, name, new_index)


def _adopt(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Write the pruned fields into the config objects that the model's modules already share."""
    inner, pruned = text_config(model.config), text_config(config)
    for name in [*kept_fields(inner, range(depth(config))), "num_hidden_layers"]:
        setattr(inner, name, getattr(pruned, name))
