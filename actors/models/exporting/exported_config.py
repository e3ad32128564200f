"""The config.json of an export: the source's own, in which only what a removal changes is changed.

transformers reads files of many versions and writes those of its own, which older versions, and the
runtimes built on them, read wrongly. So an export does not have it write the file anew.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from actors.models.families import MTP_COUNTS, kept_fields, text_config

Json = dict[str, Any]

NOT_OF_LAYERS = frozenset(
    {"architectures", "auto_map", "dtype", "quantization_config", "torch_dtype", "transformers_version"}
)
"""Fields of how a model is stored, not how it is built."""

PERIODS = frozenset(
    {
        "attn_layer_period",
        "expert_layer_period",
        "full_attention_interval",
        "global_attn_every_n_layers",
        "index_topk_freq",
        "interleave_moe_layer_step",
        "moe_layer_freq",
        "moe_layer_interval",
        "no_rope_layer_interval",
        "sliding_window_pattern",
        "_sliding_window_pattern",
    }
)
"""Fields from which a reader computes the kinds of all layers if no list gives them."""

OLDER_NAMES = {"qwen3_moe": {"num_experts": "num_local_experts"}}
"""Fields that transformers 5 writes under a name new to transformers 4, by model type."""

UNREADABLE = (
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    LookupError,
    StrictDataclassError,
)
"""Errors of configurations at fields that do not suit each other."""


def exported_config(
    source: Mapping[str, Any],
    before: PretrainedConfig,
    after: PretrainedConfig,
    kept: Sequence[int] | None = None,
) -> Json:
    """Return the source's config.json with the fields changed in which `after` differs from `before`.

    Fields that `source` does not have are added only where transformers would otherwise read another
    value. Periods that no longer give the kinds of the layers are corrected or removed.

    Args:
        source: config.json of the source as written.
        before: how transformers reads it.
        after: the configuration of the exported model, of the same class.
        kept: the source's layers that stay, ascending; without it, lists that are no fields of transformers
            cannot be shortened and go.
    """
    exported = copy.deepcopy(dict(source))
    _shorten(decoder_part(exported, after), before, after, kept)
    if kept is None:
        _write(exported, _values(before), _values(after), after, add=False)
    try:
        _complete(exported, after)
        _fix_periods(exported, before, after, kept)
        _complete(exported, after)
    except UNREADABLE:
        # Fields of an older version that no rule here shortens: better another spelling than a wrong one.
        exported = json.loads(after.to_json_string())
    _add_older_fields(exported, after)
    return exported


def decoder_part(fields: Json, config: PretrainedConfig) -> Json:
    """Return the part of a config.json that describes the decoder: older files have it at the top."""
    decoder = text_config(config)
    for name in config.sub_configs if decoder is not config else ():
        part, written = getattr(config, name, None), fields.get(name)
        if part is decoder and isinstance(written, dict):
            return written
        if isinstance(part, PretrainedConfig) and isinstance(written, dict) and text_config(part) is decoder:
            return decoder_part(written, part)
    return fields


def shifted_fields(
    source: Mapping[str, Any], exported: Json, before: PretrainedConfig, after: PretrainedConfig
) -> list[str]:
    """Return the per-layer fields that the family computes from a layer's index, but no longer right."""
    shifted = []
    by_index = copy.deepcopy(exported)
    old, new = decoder_part(dict(source), before), decoder_part(by_index, after)
    new |= {name: old[name] for name in PERIODS & old.keys()}
    rule = _computed_lists(by_index, before, after)
    for name, was in _computed_lists(source, before, before).items():
        follows = was is not None and was == _listed(before).get(name)
        if follows and rule.get(name) != _listed(after).get(name):
            shifted.append(name)
    return shifted


def _add_older_fields(fields: Json, config: PretrainedConfig) -> None:
    """Add to a config.json that transformers 5 wrote what transformers 4 reads in its place.

    Fields by which transformers 5 itself would read the file otherwise are left out: its new families
    have some of the same names.
    """
    written_by_5 = str(fields.get("transformers_version", "")).partition(".")[0] not in ("", *"01234")
    if written_by_5 and isinstance(fields.get("dtype"), str):
        fields.setdefault("torch_dtype", fields["dtype"])
    completed = copy.deepcopy(fields)
    for part in (completed, *completed.values()):
        if not isinstance(part, dict):
            continue
        model_type = str(part.get("model_type"))
        older = {old: part[new] for old, new in OLDER_NAMES.get(model_type, {}).items() if new in part}
        if isinstance(rope := part.get("rope_parameters"), dict):
            older |= _older_rope(rope, model_type)
        for name, value in older.items():
            part.setdefault(name, value)
    try:
        read = _values(_read(completed, config))
    except UNREADABLE:
        return
    if all(read.get(name) == value for name, value in _values(_read(fields, config)).items()):
        fields |= completed


def _older_rope(rope: Json, model_type: str) -> Json:
    """Return `rope_parameters` under the names of transformers 4."""
    if "full_attention" in rope:
        whole, local = rope["full_attention"] or {}, rope.get("sliding_attention") or {}
        fields = _older_rope(whole, model_type)
        if model_type.startswith("modernbert"):
            return {"global_rope_theta": whole.get("rope_theta"), "local_rope_theta": local.get("rope_theta")}
        if model_type.startswith(("gemma3", "t5gemma2")) and "rope_theta" in local:
            fields["rope_local_base_freq"] = local["rope_theta"]
        return fields
    if not isinstance(rope.get("rope_theta"), (int, float)):
        return {}
    scaling = {
        name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")
    }
    fields = {"rope_theta": rope["rope_theta"]}
    if model_type.startswith("gpt_neox"):
        fields = {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    elif "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if scaling.get("rope_type", "default") == "default":
        return fields
    if model_type.startswith("phi3") or model_type == "phimoe":
        # Its own check allows these three, and the type under its first name.
        scaling = {"type": scaling["rope_type"]} | {n: scaling[n] for n in scaling if n.endswith("_factor")}
    return fields | {"rope_scaling": scaling}


def _values(config: PretrainedConfig) -> Json:
    """Return the fields of a configuration as JSON values."""
    return json.loads(config.to_json_string(use_diff=False))


def _read(fields: Mapping[str, Any], config: PretrainedConfig) -> PretrainedConfig:
    """Return what transformers reads of a config.json, in which it spells infinity as a mapping."""

    def number(mapping: Json) -> Any:
        return float(mapping["__float__"]) if mapping.keys() == {"__float__"} else mapping

    return type(config).from_dict(json.loads(json.dumps(fields), object_hook=number))


def _listed(config: PretrainedConfig) -> dict[str, list[Any]]:
    """Return the decoder's lists with an entry for each layer, or of layers' indices."""
    decoder = text_config(config)
    fields = kept_fields(decoder, range(decoder.num_hidden_layers))
    return {name: list(value) for name, value in fields.items() if isinstance(value, (list, tuple))}


def _names(name: str, fields: Iterable[str], config: PretrainedConfig) -> list[str]:
    """Return the names under which a field stands in a file: a family's own, transformers' common one."""
    same = {name, *(alias for alias, own in config.attribute_map.items() if own == name)}
    return sorted(same.intersection(fields))


def _shorten(
    fields: Json, before: PretrainedConfig, after: PretrainedConfig, kept: Sequence[int] | None
) -> None:
    """Rewrite what the file itself has for each layer, under the names and values of its own version."""
    num_layers = text_config(before).num_hidden_layers
    every = range(num_layers)
    beyond = max((fields[name] for name in MTP_COUNTS if isinstance(fields.get(name), int)), default=0)
    for name in _listed(before).keys() & fields.keys():
        if isinstance(fields[name], list) and len(fields[name]) == num_layers + beyond:
            fields[name] = fields[name][:num_layers]  # the rest is of multi-token prediction
    per_layer = kept_fields(SimpleNamespace(**fields | {"num_hidden_layers": num_layers}), kept or every)
    per_layer |= {
        name: "".join(value[layer] for layer in kept or every)
        for name, value in fields.items()
        if name.endswith("pattern") and isinstance(value, str) and len(value) == num_layers
    }
    if kept is None:
        unknown = [name for name in per_layer if name in fields and not hasattr(text_config(after), name)]
        for name in unknown if text_config(after).num_hidden_layers != num_layers else ():
            del fields[name]
        return
    fields |= {name: value for name, value in per_layer.items() if name in fields}
    decoder = text_config(after)
    own = decoder.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    fields |= dict.fromkeys(_names(own, fields, decoder), len(kept))


def _write(fields: Json, read: Json, wanted: Json, config: PretrainedConfig, *, add: bool) -> None:
    """Write into `fields` those values of `wanted` that are not as `read`; new fields only if `add`."""
    for name, value in wanted.items():
        if name in NOT_OF_LAYERS | PERIODS or name.startswith("_") or read.get(name) == value:
            continue
        part = getattr(config, name, None) if name in config.sub_configs else None
        if isinstance(part, PretrainedConfig) and isinstance(read.get(name), dict):
            inner = fields.get(name)
            if not isinstance(inner, dict):
                inner = fields.setdefault(name, {}) if add else fields
            _write(inner, read[name], value, part, add=add)
            continue
        held = _names(name, fields, config)
        fields |= dict.fromkeys(held or ([name] if add else []), value)


def _complete(fields: Json, config: PretrainedConfig) -> None:
    """Add or correct what transformers would read otherwise than in `config`."""
    _write(fields, _values(_read(fields, config)), _values(config), config, add=True)


def _computed_lists(
    fields: Mapping[str, Any], config: PretrainedConfig, described: PretrainedConfig, **rules: Any
) -> dict[str, list[Any] | None]:
    """Return the lists that transformers computes for as many layers as `described` has if none are written.

    Args:
        rules: periods to read in place of the file's.
    """
    lists = _listed(described)
    without = copy.deepcopy(dict(fields))
    decoder = text_config(described)
    part = decoder_part(without, described)
    for name in lists:
        for written in _names(name, part, decoder):
            del part[written]
    own = decoder.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    part |= dict.fromkeys(_names(own, part, decoder) or [own], decoder.num_hidden_layers) | rules
    try:
        read = text_config(_read(without, config))
    except UNREADABLE:
        return dict.fromkeys(lists)
    computed = {name: getattr(read, name, None) for name in lists}
    return {
        name: list(value) if isinstance(value, (list, tuple)) else None for name, value in computed.items()
    }


def _fix_periods(
    exported: Json, before: PretrainedConfig, after: PretrainedConfig, kept: Sequence[int] | None
) -> None:
    """Change or remove periods of which the layers' kinds no longer are."""
    fields, num_layers = decoder_part(exported, after), text_config(after).num_hidden_layers
    lists = _listed(after)
    for name in sorted(PERIODS & fields.keys()):
        if isinstance(fields[name], str):
            _fix_pattern(fields, name, text_config(before).num_hidden_layers, kept)
            continue
        rule = name.lstrip("_")
        by_period = {
            period: _computed_lists(exported, after, after, **{rule: period})
            for period in range(1, num_layers + 2)
        }
        ruled = [n for n in lists if any(found[n] != by_period[1][n] for found in by_period.values())]
        right = [p for p, found in by_period.items() if all(found[n] == lists[n] for n in ruled)]
        if not ruled or fields[name] in right:
            continue
        if isinstance(fields[name], int) and fields[name] > num_layers and num_layers + 1 in right:
            continue
        if right:
            fields[name] = right[0]
        else:
            del fields[name]


def _fix_pattern(fields: Json, name: str, num_layers: int, kept: Sequence[int] | None) -> None:
    """Write out a pattern of letters that readers repeat, such as LLLG, if it no longer repeats."""
    pattern: str = fields[name]
    if kept is None or not pattern:
        return
    letters = "".join(pattern[layer % len(pattern)] for layer in kept)
    if any(letter != pattern[layer % len(pattern)] for layer, letter in enumerate(letters)):
        fields[name] = letters
