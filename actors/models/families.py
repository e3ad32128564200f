"""What a decoder family looks like: where its blocks are and which config fields count layers.

Everything is found from the model and its config; the tables below list only the
field names whose meaning cannot be seen from their value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from actors.errors import RequestError

INDEX_LISTS = frozenset(
    {"mlp_only_layers", "moe_layers", "full_attn_idxs", "global_attn_every_n_layers_idxs"}
)
"""Config fields that list layer indices."""

NOT_PER_LAYER = frozenset({"architectures", "eos_token_id"})
"""Config lists that have nothing to do with layers, even when they are as long."""

LEADING_COUNTS = frozenset({"first_k_dense_replace", "max_window_layers", "num_dense_layers"})
"""Config fields that say how many layers, from layer 0 on, are of another kind."""


@dataclass(frozen=True)
class LayerList:
    """The block list of a model: `getattr(parent, attribute)`, at `path` from the model's root.

    `parent` is the backbone: its forward embeds the tokens, runs the blocks and the
    final norm, and gives `last_hidden_state`.
    """

    path: str
    parent: nn.Module
    attribute: str

    @property
    def modules(self) -> nn.ModuleList:
        return getattr(self.parent, self.attribute)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config that describes the decoder (multimodal configs nest it)."""
    return config.get_text_config(decoder=True)


def depth(config: PretrainedConfig) -> int:
    """Number of transformer blocks the config declares.

    Raises:
        RequestError: the config has no depth, so it is no decoder language model.
    """
    layers = getattr(text_config(config), "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise RequestError(
            f"model type {config.model_type!r} declares no num_hidden_layers: not a decoder language model"
        )
    return layers


def find_layers(model: PreTrainedModel) -> LayerList:
    """The outermost `ModuleList` as long as the config's depth.

    Raises:
        RequestError: no such list, so this family cannot be pruned block by block.
    """
    num_layers = depth(model.config)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not found:
        raise RequestError(
            f"model type {model.config.model_type!r} keeps no list of {num_layers} blocks; "
            "depth pruning needs one"
        )
    path = min((name for name, _ in found), key=lambda name: name.count("."))
    parent_path, _, attribute = path.rpartition(".")
    return LayerList(path, model.get_submodule(parent_path), attribute)


def kept_fields(config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """New values of every per-layer config field once only the layers `kept` remain.

    Args:
        config: the decoder's config, with N layers.
        kept: indices of the remaining layers, ascending, each in 0..N-1.
    """
    num_layers = config.num_hidden_layers
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name in INDEX_LISTS and isinstance(value, (list, tuple)):
            fields[name] = [new for new, old in enumerate(kept) if old in value]
        elif name in LEADING_COUNTS and isinstance(value, int):
            fields[name] = sum(old < value for old in kept)
        elif name not in NOT_PER_LAYER and isinstance(value, (list, tuple)) and len(value) == num_layers:
            fields[name] = [value[old] for old in kept]
    return fields
