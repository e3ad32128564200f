"""Building the model of a `ModelRef`: source or replaced weights, layers dropped, adapters merged.

Adapters are ordinary PEFT LoRA directories whose tensors are named by *source*
layer index, so each also opens on the unpruned model with plain PEFT.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from actors.artifacts import fetch
from actors.contracts import ArtifactRef, ModelRef
from actors.models.adapter_deltas import ADAPTER_WEIGHTS, add_deltas, plain_deltas
from actors.models.families import depth, find_layers
from actors.models.loading.load import open_model
from actors.models.offloading.placement import Place
from actors.models.pruning.merging import merge_blocks
from actors.models.pruning.surgery import remove_layers
from actors.models.weights import put_weights

ValueT = TypeVar("ValueT")


def build_model(ref: ModelRef, over: Sequence[Place] = ()) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model that `ref` describes, with its adapters merged, and its tokenizer; see `open_model`."""
    model, tokenizer = load_source(ref, over)
    return prune_to(model, ref), tokenizer


def load_source(ref: ModelRef, over: Sequence[Place] = ()) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the unpruned model that `ref` starts from, and its tokenizer."""
    return open_model(ref.source, over)


def prune_to(model: PreTrainedModel, ref: ModelRef) -> PreTrainedModel:
    """Turn the loaded source model into the one `ref` describes, in place."""
    kept = ref.kept(depth(model.config))
    merge_blocks(model, ref.merges)
    if ref.weights is not None:
        put_weights(model, ref.weights)
    if ref.dropped:
        remove_layers(model, ref.dropped)
    return merge_adapters(model, ref.adapters, kept)


@torch.no_grad()
def merge_adapters(
    model: PreTrainedModel, adapters: Sequence[ArtifactRef], kept: tuple[int, ...]
) -> PreTrainedModel:
    """Add the weight changes of all adapters to the layers that are still there.

    They are summed in float32 and each weight is rounded once: in bfloat16, one merge after the
    other would lose more of every change.

    Args:
        model: the pruned model.
        adapters: LoRAs whose tensors are named by source layer index.
        kept: source index of each layer of `model`.
    """
    layers = find_layers(model)
    chain = [plain_deltas(adapter, layers.path, kept) for adapter in adapters]
    linear = [
        {f"{path}.weight" for path, part in block.named_modules() if isinstance(part, (nn.Linear, Conv1D))}
        for block in layers.modules
    ]
    plain = [
        deltas
        for deltas in chain
        if deltas is not None and all(name in linear[block] for block, name in deltas.factors)
    ]
    if len(plain) < len(chain):
        return _merge_by_peft(model, adapters, kept)
    for block, name in {place for deltas in plain for place in deltas.factors}:
        layer = layers.modules[block].get_submodule(name.removesuffix(".weight"))
        as_kept = [replace(deltas, transposed=isinstance(layer, Conv1D)) for deltas in plain]
        add_deltas(layer.weight, as_kept, block, name)
    return model


def _merge_by_peft(
    model: PreTrainedModel, adapters: Sequence[ArtifactRef], kept: tuple[int, ...]
) -> PreTrainedModel:
    """Merge adapters of any kind one after the other; changed weights are float32 until the last."""
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    current = {source: position for position, source in enumerate(kept)}
    path = find_layers(model).path
    for adapter in adapters:
        directory = fetch(adapter)
        config = LoraConfig.from_pretrained(str(directory))
        config.base_model_name_or_path = None  # one of another machine or a cache is no reason for a warning
        if config.layers_to_transform is not None:
            config.layers_to_transform = [current[i] for i in config.layers_to_transform if i in current]
        config.rank_pattern = rename_layers(config.rank_pattern, path, current)
        config.alpha_pattern = rename_layers(config.alpha_pattern, path, current)
        weights = rename_layers(load_file(directory / ADAPTER_WEIGHTS), path, current)
        adapted = get_peft_model(model, config)
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):
                layer.get_base_layer().to(torch.float32)
        set_peft_model_state_dict(adapted, weights)
        model = adapted.merge_and_unload()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types[name])
    return model


def rename_layers(
    values: Mapping[str, ValueT], layers_path: str, renumbered: Mapping[int, int]
) -> dict[str, ValueT]:
    """Rename `<layers_path>.<old>.` to `<layers_path>.<new>.`; leave out unlisted layers."""
    pattern = re.compile(rf"(^|\.){re.escape(layers_path)}\.(\d+)\.")
    renamed: dict[str, ValueT] = {}
    for name, value in values.items():
        match = pattern.search(name)
        if match is None:
            renamed[name] = value
        elif int(match[2]) in renumbered:
            start, end = match.span(2)
            renamed[f"{name[:start]}{renumbered[int(match[2])]}{name[end:]}"] = value
    return renamed


def device() -> torch.device:
    """Return the accelerator that this process was given, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
