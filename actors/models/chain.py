"""From a `ModelRef` to a model: source weights or those in their place, layers dropped, adapters folded in.

Adapters are ordinary PEFT LoRA directories whose tensors are named by *source*
layer index, so each also opens on the unpruned model with plain PEFT.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.artifacts import fetch
from actors.contracts import ArtifactRef, ModelRef
from actors.models.families import depth, find_layers
from actors.models.load import open_model
from actors.models.merge import merge_blocks
from actors.models.subblocks import SUB_BLOCKS, empty_sub_blocks
from actors.models.surgery import remove_layers
from actors.models.weights import put_weights

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def materialize(ref: ModelRef) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model that `ref` describes, with its adapters merged, and its tokenizer."""
    model, tokenizer = load_source(ref)
    return prune_to(model, ref), tokenizer


def load_source(ref: ModelRef) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The unpruned model that `ref` starts from, and its tokenizer."""
    return open_model(ref.source)


def prune_to(model: PreTrainedModel, ref: ModelRef) -> PreTrainedModel:
    """Turn the loaded source model into the one `ref` describes, in place."""
    kept = ref.kept(depth(model.config))
    merge_blocks(model, ref.merges)
    if ref.weights is not None:
        put_weights(model, ref.weights)
    if ref.dropped:
        remove_layers(model, ref.dropped)
    for adapter in ref.adapters:
        model = merge_adapter(model, adapter, kept)
    for kind in SUB_BLOCKS:
        if layers := emptied_layers(ref, kind, kept):
            empty_sub_blocks(model, kind, layers)
    return model


def emptied_layers(ref: ModelRef, kind: str, kept: Sequence[int]) -> list[int]:
    """Positions among the source layers `kept` of those whose sub-block of that kind is emptied."""
    return [position for position, source in enumerate(kept) if (source, kind) in ref.emptied]


def merge_adapter(model: PreTrainedModel, adapter: ArtifactRef, kept: tuple[int, ...]) -> PreTrainedModel:
    """Add an adapter's weight changes to the layers that are still there.

    Args:
        model: the pruned model.
        adapter: a LoRA whose tensors are named by source layer index.
        kept: source index of each layer of `model`.
    """
    directory = fetch(adapter)
    config = LoraConfig.from_pretrained(str(directory))
    config.base_model_name_or_path = None  # a path of another machine or a cache is no reason for a warning
    current = {source: position for position, source in enumerate(kept)}
    trained = config.layers_to_transform
    config.layers_to_transform = [current[i] for i in trained if i in current]
    weights = rename_layers(load_file(directory / ADAPTER_WEIGHTS), find_layers(model).path, current)
    adapted = get_peft_model(model, config)
    set_peft_model_state_dict(adapted, weights)
    return adapted.merge_and_unload()


def rename_layers(
    tensors: Mapping[str, Tensor], layers_path: str, renumbered: Mapping[int, int]
) -> dict[str, Tensor]:
    """Tensors with `<layers_path>.<old>.` become `<layers_path>.<new>.`; unlisted layers are left out."""
    pattern = re.compile(rf"(^|\.){re.escape(layers_path)}\.(\d+)\.")
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = pattern.search(name)
        if match is None:
            renamed[name] = tensor
        elif int(match[2]) in renumbered:
            start, end = match.span(2)
            renamed[f"{name[:start]}{renumbered[int(match[2])]}{name[end:]}"] = tensor
    return renamed


def device() -> torch.device:
    """The accelerator this process was given, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
