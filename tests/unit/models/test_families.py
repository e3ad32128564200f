"""Where blocks are, and which config fields follow them."""

import pytest
from transformers import AlbertConfig, AlbertForMaskedLM, PretrainedConfig, ResNetConfig

from actors.errors import RequestError
from actors.models.families import depth, find_layers, kept_fields
from tests.tiny_models import FAMILIES, blocks_of, tiny_model


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
