"""The config.json of an export is the source's, but for what the removal changes."""

import copy
import json
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from actors.models.exporting.exported_config import exported_config, shifted_fields
from actors.models.pruning.surgery import pruned_config
from tests.support.export_matrix import FAMILIES, SIZES

KEPT = (0, 3, 4, 5)
"""Layers that stay of six; with every third layer of another kind (2 and 5), that is now the fourth."""

_SLIDING, _FULL = "sliding_attention", "full_attention"
_FOURTH_FULL = [_SLIDING] * 3 + [_FULL]

CHANGED: dict[str, dict[str, Any]] = {family: {"num_hidden_layers": 4} for family in FAMILIES} | {
    "gpt2": {"n_layer": 4, "num_hidden_layers": 4},
    "qwen2": {"num_hidden_layers": 4, "max_window_layers": 1},
    "gemma3_text": {"num_hidden_layers": 4, "sliding_window_pattern": 4, "layer_types": _FOURTH_FULL},
    "cohere2": {"num_hidden_layers": 4, "sliding_window_pattern": 4, "layer_types": _FOURTH_FULL},
    "exaone4": {"num_hidden_layers": 4, "sliding_window_pattern": 4, "layer_types": _FOURTH_FULL},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0]},
    "llama4_text": {
        "num_hidden_layers": 4,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "layer_types": ["chunked_attention"] * 3 + [_FULL],
    },
    "qwen3_moe": {"num_hidden_layers": 4, "mlp_only_layers": [2]},
    "qwen3_next": {
        "num_hidden_layers": 4,
        "full_attention_interval": 4,
        "mlp_only_layers": [],
        "layer_types": ["linear_attention"] * 3 + [_FULL],
    },
    "deepseek_v3": {"num_hidden_layers": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    "glm4_moe": {"num_hidden_layers": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
}
"""Fields that are to differ from the source's once layers 1 and 2 are gone; all others are as they were."""


def _source(family: str) -> dict[str, Any]:
    """A config.json as transformers 4 writes it, in no order of the alphabet."""
    head = {"model_type": family, "torch_dtype": "bfloat16", "transformers_version": "4.57.6"}
    return copy.deepcopy(head | SIZES | FAMILIES.get(family, {}))


def _read(fields: dict[str, Any]) -> PretrainedConfig:
    fields = copy.deepcopy(fields)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _exported(source: dict[str, Any], kept: Sequence[int] = KEPT) -> dict[str, Any]:
    before = _read(source)
    return exported_config(source, before, pruned_config(before, kept), kept)


def _difference(source: dict[str, Any], exported: dict[str, Any]) -> dict[str, Any]:
    names = source.keys() | exported.keys()
    return {name: exported.get(name) for name in names if source.get(name) != exported.get(name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_fields_of_the_removal_differ(family: str) -> None:
    source = _source(family)
    exported = _exported(source)
    assert _difference(source, exported) == CHANGED[family]
    assert list(exported)[: len(source)] == list(source)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_5_alone_wrote_gains_the_fields_of_4(family: str) -> None:
    source = json.loads(_read(_source(family)).to_json_string())
    assert "rope_theta" not in source
    exported = _exported(source)
    settings = FAMILIES[family]
    assert exported["torch_dtype"] == exported["dtype"] == "bfloat16"
    for name in (
        "rope_theta",
        "rope_local_base_freq",
        "rotary_emb_base",
        "rotary_pct",
        "partial_rotary_factor",
    ):
        assert exported.get(name) == settings.get(name, exported.get(name)), name
    assert (exported.get("rope_scaling") or {}).items() >= settings.get("rope_scaling", {}).items()
    assert getattr(_read(exported), "rope_parameters", None) == getattr(
        _read(source), "rope_parameters", None
    )


def test_a_period_that_still_holds_is_left() -> None:
    """Both periods of three go but one: what is left is computed from the depth alone."""
    source = _source("gemma3_text")
    assert _difference(source, _exported(source, (3, 4, 5))) == {"num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("family", "period"),
    [
        ("gemma3_text", "sliding_window_pattern"),
        ("cohere2", "sliding_window_pattern"),
        ("exaone4", "sliding_window_pattern"),
        ("qwen3_next", "full_attention_interval"),
        ("smollm3", "no_rope_layer_interval"),
        ("llama4_text", "no_rope_layer_interval"),
    ],
)
def test_a_period_that_no_number_mends_goes(family: str, period: str) -> None:
    """Of layers 2 and 5, which are of another kind, both stay: they are the third and the fifth."""
    exported = _exported(_source(family), (0, 1, 2, 4, 5))
    assert period not in exported
    lists = [value for name, value in exported.items() if name in ("layer_types", "no_rope_layers")]
    assert lists
    for kinds in lists:
        assert kinds[2] == kinds[4] != kinds[0] == kinds[1] == kinds[3]


def test_a_step_of_mixtures_of_experts_goes_with_its_rule() -> None:
    source = _source("llama4_text")
    assert source["interleave_moe_layer_step"] == 2
    exported = _exported(source, (1, 2, 4, 5))
    assert exported["moe_layers"] == [0, 3]
    assert "interleave_moe_layer_step" not in exported


def test_a_pattern_of_letters_is_written_out() -> None:
    source = _source("exaone4") | {
        "sliding_window_pattern": "LLG",
        "layer_types": [_SLIDING, _SLIDING, _FULL] * 2,
    }
    assert _exported(source)["sliding_window_pattern"] == "LLLG"
    assert _exported(source, (0, 1, 2))["sliding_window_pattern"] == "LLG"
    assert _exported(source, (0, 1, 2, 5))["sliding_window_pattern"] == "LLGG"


def test_nested_decoders_change_where_they_stand() -> None:
    decoder = _source("gemma3_text") | {"torch_dtype": "bfloat16"}
    source = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": decoder,
        "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 6, "hidden_size": 32},
    }
    exported = _exported(source)
    assert _difference(source, exported) == {"text_config": exported["text_config"]}
    assert _difference(decoder, exported["text_config"]) == CHANGED["gemma3_text"]


def test_a_depth_reported_twice_is_changed_twice() -> None:
    source = _source("llama") | {"num_layers": 6, "n_layers": 7}
    assert _difference(source, _exported(source)) == {"num_hidden_layers": 4, "num_layers": 4}


@pytest.mark.parametrize(
    ("family", "kept", "shifted"),
    [
        ("gemma2", (0, 3, 4, 5), []),
        ("gemma2", (0, 2, 3, 4, 5), ["layer_types"]),
        ("gpt_oss", (1, 2, 3), ["layer_types"]),
        ("gemma3_text", (3, 4, 5), []),
        ("gemma3_text", KEPT, ["layer_types"]),
        ("smollm3", KEPT, ["no_rope_layers"]),
        ("llama", (0, 5), []),
        ("deepseek_v32", (0, 3, 4), []),
        ("qwen3_moe", (1, 2, 4), []),
    ],
)
def test_layers_that_move_off_the_rule_of_their_family_are_reported(
    family: str, kept: Sequence[int], shifted: list[str]
) -> None:
    source = _source(family)
    before = _read(source)
    assert shifted_fields(source, _exported(source, kept), before, pruned_config(before, kept)) == shifted


def test_numbers_that_json_does_not_have_stay() -> None:
    source = _source("mamba2") | {
        "num_heads": 8,
        "head_dim": 8,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }
    source |= {"state_size": 8, "n_groups": 1, "expand": 2}
    read = _read(source | {"time_step_limit": [0.0, float("inf")]})
    exported = exported_config(source, read, pruned_config(read, KEPT), KEPT)
    assert _difference(source, exported) == {"num_hidden_layers": 4}


def test_the_rules_of_rotary_positions_that_4_does_not_know_are_left_alone() -> None:
    source = json.loads(_read(_source("gemma4_text")).to_json_string())
    assert not _exported(source).keys() & {"rope_theta", "rope_scaling"}
