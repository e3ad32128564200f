"""Structure of a decoder family: where its blocks are and which config fields count layers.

Everything is found from the model and its config; the tables below list only the
field names whose meaning cannot be seen from their value.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from actors.errors import RequestError

INDEX_LISTS = frozenset(
    {
        "attn_layer_indices",
        "cross_attention_layers",
        "full_attn_idxs",
        "global_attn_every_n_layers_idxs",
        "hybrid_layer_ids",
        "local_layer_ids",
        "mlp_only_layers",
        "moe_layers",
        "ple_layer_ids",
    }
)
"""Config fields that list layer indices."""

NOT_PER_LAYER = frozenset(
    {
        "L_bp_cycles",
        "architectures",
        "axial_pos_embds_dim",
        "axial_pos_shape",
        "begin_suppress_tokens",
        "encoder_hash_byte_group_size",
        "eos_token_id",
        "languages",
        "mlp_multipliers",
        "mtp_layer_types",
        "mtp_layers_block_type",
        "mtp_local_layer_ids",
        "mtp_mlp_layer_types",
        "ssm_multipliers",
        "time_step_limit",
    }
)
"""Config lists that have nothing to do with layers, even when they are as long."""

LEADING_COUNTS = frozenset({"first_k_dense_replace", "max_window_layers", "num_dense_layers"})
"""Config fields that say how many layers, from layer 0 on, are of another kind."""

DEPTHS = frozenset({"n_layer", "n_layers", "num_blocks", "num_layers"})
"""Config fields that repeat the depth under a family's own name."""

MTP_COUNTS = frozenset({"mtp_num_hidden_layers", "num_mtp_layers", "num_nextn_predict_layers"})
"""Config fields that say how many layers of multi-token prediction follow; transformers leaves them out."""

RANGES = {"moe_layer_start_index": "moe_layer_end_index"}
"""Config fields with the first and the last index of the layers of another kind (Ernie 4.5)."""

REPEATED = frozenset({"block_types"})
"""Config lists that are repeated until there is an entry for every layer (RecurrentGemma)."""

BORROWERS = {"indexer_types": "shared"}
"""Per-layer lists of kinds, and the kind that reuses the choice of the last layer of another kind."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Config fields that say how many experts a block's router chooses from."""

EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
"""Config fields that say how many of them a token passes."""

EVERY_EXPERT = frozenset({"llama4_text"})
"""Model types that pass every token through every expert, and give those not chosen the weight 0."""

INDEXED_AT_RUN = ("rescale_every",)
"""Config fields, 0 for off, by which a model changes its layers' weights by index when it runs (RWKV)."""

INDEX_RULE = re.compile(
    r"_(period|offset|interval|step|freq|pattern|end_index)$|_every_|^n_layers_per|^scale_depth$|_by_inverse_layer"
)
"""Names of config fields that give a layer's kind by arithmetic on its index."""


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
    """Return the config that describes the decoder (multimodal configs nest it)."""
    return config.get_text_config(decoder=True)


def depth(config: PretrainedConfig) -> int:
    """Return the number of transformer blocks that the config declares.

    Raises:
        RequestError: the config has no depth, so it is no decoder language model.
    """
    if config.is_encoder_decoder or getattr(type(config), "is_encoder_decoder", False):
        raise RequestError(
            f"model type {config.model_type!r} is an encoder with a decoder (config field "
            "'is_encoder_decoder'); only decoder language models are pruned"
        )
    layers = getattr(text_config(config), "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise RequestError(
            f"model type {config.model_type!r} declares no num_hidden_layers: not a decoder language model"
        )
    return layers


def experts_of(config: PretrainedConfig) -> tuple[int, int] | None:
    """Return how many experts a block's router chooses from, and how many of them a token passes.

    None where the config does not say both. Where layers differ, it is the least choice and the most passed.
    """
    parts = [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]

    def find(names: Sequence[str]) -> list[int]:
        values = [getattr(part, name, None) for part in parts for name in names]
        found = next((value for value in values if value), 0)
        return [count for count in (found if isinstance(found, (list, tuple)) else [found]) if count]

    num_experts, num_passed = find(EXPERTS), find(EXPERTS_PER_TOKEN)
    if not num_experts or not num_passed:
        return None
    if config.model_type in EVERY_EXPERT:
        num_passed = num_experts
    return min(num_experts), min(min(num_experts), max(num_passed))


def find_layers(model: PreTrainedModel) -> LayerList:
    """Return the outermost `ModuleList` of the decoder that is as long as the config's depth.

    Raises:
        RequestError: no such list, so this family cannot be pruned block by block.
    """
    num_layers = depth(model.config)
    decoder = model.get_decoder()
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    inside = {id(module) for module in decoder.modules()}
    paths = [name for name, module in lists.items() if id(module) in inside] or list(lists)
    if not paths:
        raise RequestError(
            f"model type {model.config.model_type!r} keeps no list of {num_layers} blocks "
            "(config field 'num_hidden_layers'); depth pruning needs one"
        )
    path = min(paths, key=lambda name: name.count("."))
    parent_path, _, attribute = path.rpartition(".")
    return LayerList(path, model.get_submodule(parent_path), attribute)


def find_backbone(model: PreTrainedModel) -> nn.Module:
    """Return the innermost module around the blocks that takes token ids (BERT: an encoder inside)."""
    path = find_layers(model).path
    while path := path.rpartition(".")[0]:
        module = model.get_submodule(path)
        if "input_ids" in signature(module.forward).parameters:
            return module
    return model


def kept_fields(config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """Return the new values of every per-layer config field once only the layers `kept` remain.

    Args:
        config: the decoder's config, with N layers.
        kept: indices of the remaining layers, ascending, each in 0..N-1.
    """
    num_layers = config.num_hidden_layers
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            kept_list = _kept_list(name, value, num_layers, kept)
            fields |= {} if kept_list is None else {name: kept_list}
        elif name in LEADING_COUNTS and isinstance(value, int) and value < num_layers:
            fields[name] = sum(old < value for old in kept)
        elif name in DEPTHS and value == num_layers:
            fields[name] = len(kept)
        elif name in MTP_COUNTS and isinstance(value, int):
            fields[name] = 0
    for first, last in RANGES.items():
        if isinstance(values.get(first), int) and isinstance(values.get(last), int):
            fields[first] = sum(old < values[first] for old in kept)
            fields[last] = sum(old <= values[last] for old in kept) - 1
    if "attention_types" in values and "attention_layers" in fields:
        # GPT-Neo spells its list of kinds as [[kinds, repetitions], ...] too.
        fields["attention_types"] = [[fields["attention_layers"], 1]]
    return fields


def _kept_list(name: str, value: Sequence[Any], num_layers: int, kept: Sequence[int]) -> list[Any] | None:
    """Return the entries of a list for the layers `kept`, None if it is not about layers."""
    if name in INDEX_LISTS:
        return [new for new, old in enumerate(kept) if old in value]
    if name in REPEATED and value:
        return [value[old % len(value)] for old in kept]
    if name not in NOT_PER_LAYER and len(value) == num_layers:
        return [value[old] for old in kept]
    return None


def kept_overrides(config: PretrainedConfig, kept: Sequence[int]) -> dict[int, dict[str, Any]] | None:
    """Return `per_layer_config` of a heterogeneous model for the layers `kept`, None if there is none."""
    written = config.to_dict().get("per_layer_config") if config.is_heterogeneous else None
    if written is None:
        return None
    overrides = {int(layer): fields for layer, fields in written.items()}
    return {new: overrides[old] for new, old in enumerate(kept) if old in overrides}


def index_rules(config: PretrainedConfig) -> list[str]:
    """Return the fields of `config`, with values, that give a layer's kind by arithmetic on its index."""
    return [
        f"{name}={value}"
        for name, value in sorted(vars(config).items())
        if INDEX_RULE.search(name)
        and isinstance(value, (int, float))
        and value is not False
        and not name.startswith("_")
    ]


def check_layers_apart(config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Refuse layers that no config can renumber: bound to their index or to an earlier layer's inner states.

    Raises:
        RequestError: weights scaled by index, shared KV layers, or a borrower whose lender goes or changes.
    """
    for name in INDEXED_AT_RUN:
        if getattr(config, name, 0):
            raise RequestError(
                f"model type {config.model_type!r} scales its layers' weights by their index when it runs "
                f"(config field {name}={getattr(config, name)}); it cannot be pruned"
            )
    if getattr(config, "num_kv_shared_layers", 0):
        raise RequestError(
            f"model type {config.model_type!r}: its last layers use the keys and values of earlier ones "
            f"(config field num_kv_shared_layers={config.num_kv_shared_layers}); it cannot be pruned"
        )
    for name, borrower in BORROWERS.items():
        kinds = getattr(config, name, None) or []
        lenders = [_lender(kinds, layer, borrower) for layer in range(len(kinds))]
        kinds_kept = [kinds[old] for old in kept] if kinds else []
        for new, old in enumerate(kept if kinds else ()):
            lender = _lender(kinds_kept, new, borrower)
            if lender is None or kept[lender] != lenders[old]:
                raise RequestError(
                    f"model type {config.model_type!r}: layer {old} is {borrower!r} in config field "
                    f"{name!r} and goes on with the choice of layer {lenders[old]}; drop both or neither"
                )


def _lender(kinds: Sequence[str], layer: int, borrower: str) -> int | None:
    """Return the layer whose choice `layer` uses: itself unless it is a borrower."""
    return next((i for i in range(layer, -1, -1) if kinds[i] != borrower), None)
