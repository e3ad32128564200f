"""Removing whole transformer blocks from a loaded model."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from actors.errors import RequestError
from actors.models.families import (
    check_layers_apart,
    find_layers,
    index_rules,
    kept_fields,
    kept_overrides,
    text_config,
)

OWN_INDEX = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
"""Attributes in which a block keeps its own index; the KV cache is addressed by it."""

KINDS = ("layer_types", "layers_block_type", "attn_layer_period", "attn_layer_indices", "block_types")
"""Config fields that say which layers of a hybrid have attention."""


def remove_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Drop blocks from `model` in place and return it.

    The result, saved and loaded by plain transformers, computes what `model`
    computes with those blocks skipped. Everything is checked before
    anything is changed.

    Args:
        model: a decoder language model of N blocks.
        layers: indices of the blocks to drop, in `model` as given, 0..N-1.

    Raises:
        RequestError: an index out of range or repeated, no block left, or a
            family whose config cannot express the result (names the field).
    """
    kept = check_removal(model, layers)
    block_list = find_layers(model)
    blocks = list(block_list.modules)
    for new_index, old_index in enumerate(kept):
        for module in blocks[old_index].modules():
            for name in OWN_INDEX:
                if getattr(module, name, None) == old_index:
                    setattr(module, name, new_index)
    setattr(block_list.parent, block_list.attribute, nn.ModuleList(blocks[i] for i in kept))
    # The model's modules share the config objects, so these are changed rather than replaced.
    inner = text_config(model.config)
    stale = {id(value): name for name, value in vars(inner).items() if isinstance(value, list)}
    _shrink(inner, kept)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            # Zamba's backbone holds on to a list of the config.
            if isinstance(value, list) and id(value) in stale:
                setattr(module, name, getattr(inner, stale[id(value)]))
    return model


def check_removal(model: PreTrainedModel, layers: Sequence[int]) -> list[int]:
    """Check that `remove_layers` would succeed; return the indices that stay. Changes nothing.

    A model without weights (`empty_model`) will do.

    Raises:
        RequestError: as `remove_layers`.
    """
    kept = remaining(len(find_layers(model).modules), layers)
    _check_rebuilds(model, pruned_config(model.config, kept), kept)
    return kept


def blocks_alike(model: PreTrainedModel) -> bool:
    """Return true if only weights distinguish the blocks: no attribute, no buffer, no field of the config."""
    config, blocks = text_config(model.config), list(find_layers(model).modules)
    if index_rules(config) or kept_overrides(config, range(len(blocks))) is not None:
        return False
    for value in kept_fields(config, range(len(blocks))).values():
        listed = isinstance(value, (list, tuple))
        if any(item != value[0] for item in value) if listed else value not in (0, len(blocks)):
            return False
    first, buffers = dict(traits(blocks[0])), dict(_unsaved_buffers(blocks[0]))
    return all(
        dict(traits(block)) == first
        and all(b.device.type == "meta" or b.equal(buffers[name]) for name, b in _unsaved_buffers(block))
        for block in blocks
    )


def without_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Return a model without those blocks that shares its weights with `model`, which stays as it is.

    Raises RequestError as `remove_layers` does.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    view = copy.deepcopy(model, shared)
    return remove_layers(view, layers) if layers else view


def remaining(num_layers: int, dropped: Sequence[int]) -> list[int]:
    """Return the indices that stay when `dropped` are removed, ascending.

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
    """Return a copy of `config` that describes the model with only the blocks `kept`.

    Raises:
        RequestError: the family's config cannot say so (names the field).
    """
    pruned = copy.deepcopy(config)
    _shrink(text_config(pruned), kept)
    if len(kept) == text_config(config).num_hidden_layers:
        return pruned
    check_layers_apart(text_config(config), kept)
    _check_reads_back(pruned, kept_fields(text_config(config), kept))
    _check_cache(text_config(config), text_config(pruned))
    return pruned


def _shrink(config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Rewrite every per-layer field of a decoder's config in place."""
    overrides, fields = kept_overrides(config, kept), kept_fields(config, kept)
    if overrides is not None:
        config.per_layer_config = None
    for name, value in fields.items():
        _set_field(config, name, value)
    _set_field(config, "num_hidden_layers", len(kept))
    if overrides is not None:
        config.per_layer_config = overrides


def _set_field(config: PretrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except AttributeError as error:
        raise RequestError(
            f"model type {config.model_type!r}: config field {name!r} is computed and cannot be set "
            "for a pruned model; this family cannot be pruned"
        ) from error


def read_back(config: PretrainedConfig) -> PretrainedConfig:
    """Return `config` as read from its file: some families compute or force fields when they read it."""
    return type(config).from_dict(copy.deepcopy(config.to_diff_dict()))


def _check_reads_back(config: PretrainedConfig, fields: dict[str, Any]) -> None:
    """Check that transformers opens a model of this config again and reads these fields as they are.

    Raises:
        RequestError: it does not.
    """
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not hasattr(config, "auto_map"):
        raise RequestError(
            f"config field model_type={config.model_type!r}: transformers saves such a model but does not "
            "open it again as a causal language model; it cannot be pruned"
        )
    try:
        read = text_config(read_back(config))
    except (ValueError, StrictDataclassError) as error:
        raise RequestError(
            f"model type {config.model_type!r}: transformers refuses the pruned config "
            f"(config fields {', '.join(fields)}): {error}"
        ) from error
    for name, value in fields.items():
        if (back := getattr(read, name, value)) != value and list(back) != list(value):
            raise RequestError(
                f"model type {config.model_type!r}: config field {name!r} would have to be {value!r}, "
                f"but is read back as {back!r}"
            )


def _check_cache(config: PretrainedConfig, pruned: PretrainedConfig) -> None:
    """Refuse to drop a hybrid's last layer with a KV cache, from which it takes the sequence length."""

    def has_kv(described: PretrainedConfig) -> bool:
        return any(isinstance(layer, CacheLayerMixin) for layer in DynamicCache(config=described).layers)

    if has_kv(config) and not has_kv(pruned):
        field = next((name for name in KINDS if name in vars(config)), "layer_types")
        raise RequestError(
            f"model type {config.model_type!r}: no attention layer would be left (config field {field!r}), "
            "and without one transformers cannot count the tokens in the cache; keep at least one"
        )


def _check_rebuilds(model: PreTrainedModel, config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Refuse unless a model built afresh from the saved `config` has exactly the kept blocks.

    Blocks are compared without weights (on the meta device): their modules,
    parameter shapes and plain attributes. This finds every rule that a family
    derives from a block's own index (patterns, periods, scales), by name. So
    are the shapes outside the blocks, where some families hold a part for each
    block (per-layer embeddings).
    """
    with torch.device("meta"):
        rebuilt = type(model)(read_back(config))
    blocks, rebuilt_blocks = find_layers(model).modules, find_layers(rebuilt).modules
    for new_index, old_index in enumerate(kept):
        change = _first_change(traits(blocks[old_index]), traits(rebuilt_blocks[new_index]))
        if change:
            raise RequestError(
                f"model type {config.model_type!r}: its config cannot say that layer {old_index} becomes "
                f"layer {new_index}: {change} ({_why(text_config(config))})"
            )
    _check_buffers(blocks, kept, config)
    change = _first_change(_shapes_outside_blocks(model), _shapes_outside_blocks(rebuilt))
    if change:
        raise RequestError(
            f"model type {config.model_type!r} holds a part for each layer outside its blocks, as many as "
            f"config field 'num_hidden_layers' says, so that it cannot be pruned: {change}"
        )


def _check_buffers(blocks: nn.ModuleList, kept: Sequence[int], config: PretrainedConfig) -> None:
    """Refuse if a moved block has an unsaved buffer unlike its equals: it is computed from the index."""
    alike: dict[Any, Tensor] = {}
    for index, block in enumerate(blocks):
        moved = index in kept and kept.index(index) != index
        for name, buffer in _unsaved_buffers(block):
            first = alike.setdefault((name, *sorted(traits(block))), buffer)
            if first.device.type != "meta" and not torch.equal(first, buffer) and moved:
                raise RequestError(
                    f"model type {config.model_type!r}: {name!r} of layer {index} is computed from the "
                    f"layer's index when the model is loaded ({_why(text_config(config))})"
                )


def _unsaved_buffers(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in block.named_modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers.get(name)) is not None:
                yield f"{path}.{name}".lstrip("."), buffer


def _why(config: PretrainedConfig) -> str:
    if rules := index_rules(config):
        return f"config fields that go by a layer's index: {', '.join(rules)}"
    return "no config field says so: the family computes it from a layer's index and 'num_hidden_layers'"


def _first_change(want: Iterable[tuple[str, Any]], got: Iterable[tuple[str, Any]]) -> str | None:
    """Return the first name, in order of the alphabet, whose value differs, in words."""
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


def traits(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield names and values that distinguish one block from another, without weights and own index."""
    for path, module in block.named_modules():
        yield f"{path}:class", type(module).__name__
        for name, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str)) and not name.startswith("_")
            if plain and name not in OWN_INDEX and name != "training":
                yield f"{path}.{name}".lstrip("."), value
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{name}:shape", tuple(parameter.shape)
