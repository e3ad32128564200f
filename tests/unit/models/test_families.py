"""Where blocks are, and which config fields follow them."""

import pytest
from transformers import AlbertConfig, AlbertForMaskedLM, AutoConfig, PretrainedConfig, ResNetConfig

from actors.errors import RequestError
from actors.models.families import (
    INDEX_LISTS,
    NOT_PER_LAYER,
    REPEATED,
    check_layers_apart,
    depth,
    find_layers,
    index_rules,
    kept_fields,
    kept_overrides,
)
from tests.support.decoder_zoo import decoder_types, tiny_decoder
from tests.support.tiny_models import FAMILIES, blocks_of, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_list_is_found(family: str) -> None:
    model = tiny_model(family)
    found = find_layers(model)
    assert found.modules is blocks_of(model)
    assert model.get_submodule(found.path) is found.modules
    assert depth(model.config) == len(found.modules) == 6


def test_experts_as_many_as_layers_are_not_taken_for_blocks() -> None:
    model = tiny_model("mixtral", num_local_experts=6)
    assert find_layers(model).path == "model.layers"


def test_a_model_without_depth_is_refused() -> None:
    with pytest.raises(RequestError, match="'resnet' declares no num_hidden_layers"):
        depth(ResNetConfig())


def test_shared_blocks_are_refused() -> None:
    """ALBERT runs one block N times."""
    model = AlbertForMaskedLM(
        AlbertConfig(
            vocab_size=50,
            embedding_size=8,
            hidden_size=8,
            num_attention_heads=2,
            intermediate_size=8,
            num_hidden_layers=6,
        )
    )
    with pytest.raises(RequestError, match="'albert' keeps no list of 6 blocks"):
        find_layers(model)


def test_every_kind_of_per_layer_field_follows_the_kept_layers() -> None:
    config = PretrainedConfig(
        num_hidden_layers=5,
        block_kinds=["a", "b", "c", "d", "e"],
        mlp_only_layers=[0, 3],
        moe_layers=[1, 2, 4],
        first_k_dense_replace=2,
        max_window_layers=4,
        eos_token_id=[1, 2, 3, 4, 5],
        unrelated=[1, 2, 3],
    )
    assert kept_fields(config, [1, 3, 4]) == {
        "block_kinds": ["b", "d", "e"],
        "mlp_only_layers": [1],
        "moe_layers": [0, 2],
        "first_k_dense_replace": 1,
        "max_window_layers": 2,
    }


@pytest.mark.parametrize(
    ("fields", "kept", "want"),
    [
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 3}, [0, 2, 3, 4], (1, 2)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 3}, [1, 2], (0, 1)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 3}, [3, 4], (0, 0)),
    ],
)
def test_a_range_of_layers_follows(fields: dict[str, int], kept: list[int], want: tuple[int, int]) -> None:
    assert tuple(kept_fields(PretrainedConfig(num_hidden_layers=5, **fields), kept).values()) == want


def test_a_repeated_list_is_written_out() -> None:
    config = PretrainedConfig(num_hidden_layers=7, block_types=["recurrent", "recurrent", "attention"])
    kinds = ["recurrent", "recurrent", "attention"] * 3
    assert kept_fields(config, [1, 2, 4, 5, 6]) == {"block_types": [kinds[i] for i in (1, 2, 4, 5, 6)]}


def test_overrides_of_single_layers_follow() -> None:
    config = tiny_decoder("gemma4_text").config
    assert kept_overrides(config, range(6)) == {i: {"head_dim": 16} for i in (1, 3, 5)}
    assert kept_overrides(config, [0, 3, 4, 5]) == {i: {"head_dim": 16} for i in (1, 3)}
    assert kept_overrides(PretrainedConfig(num_hidden_layers=5), [0, 3]) is None


@pytest.mark.parametrize(("kept", "fine"), [([0, 1, 2, 3], True), ([2, 3, 4], False), ([1, 2, 4], True)])
def test_a_layer_that_goes_on_with_anothers_choice_stays_with_it(kept: list[int], fine: bool) -> None:
    config = PretrainedConfig(num_hidden_layers=5, indexer_types=["full", "full", "shared", "full", "shared"])
    config.indexer_types[4] = "full"
    if fine:
        check_layers_apart(config, kept)
        return
    with pytest.raises(RequestError, match=r"layer 2 is 'shared' in config field 'indexer_types'.* layer 1"):
        check_layers_apart(config, kept)


@pytest.mark.parametrize("field", ["num_kv_shared_layers", "rescale_every"])
def test_layers_bound_to_others_or_to_their_index_are_refused(field: str) -> None:
    with pytest.raises(RequestError, match=f"config field {field}=2"):
        check_layers_apart(PretrainedConfig(num_hidden_layers=5, **{field: 2}), [0, 1])


def test_fields_that_go_by_the_index_are_named() -> None:
    config = AutoConfig.for_model("jamba", attn_layer_period=4, attn_layer_offset=1)
    assert "attn_layer_period=4" in index_rules(config)
    assert "attn_layer_offset=1" in index_rules(config)
    assert index_rules(AutoConfig.for_model("llama")) == []


def test_every_list_in_every_config_is_known() -> None:
    """A list that is not as long as the model is deep says nothing about layers, or is in a table."""
    known = INDEX_LISTS | NOT_PER_LAYER | REPEATED | {"attention_types"}
    for model_type in decoder_types():
        if model_type == "gemma4_assistant":  # has no defaults
            continue
        config = AutoConfig.for_model(model_type).get_text_config(decoder=True)
        unlike = {
            name
            for name, value in vars(config).items()
            if isinstance(value, (list, tuple)) and len(value) != getattr(config, "num_hidden_layers", None)
        }
        assert unlike <= known, model_type
