"""How many tokens a model can read: found without weights, and right when the model runs."""

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.models.loading.positions import context_length, position_limit
from tests.support.decoder_zoo import tiny_decoder
from tests.support.tiny_models import MAX_POSITIONS

TABLES = ["gpt2", "opt", "gptj", "codegen", "ctrl", "gpt_neo", "gpt_bigcode", "biogpt", "openai-gpt", "mpt"]
COMPUTED = ["llama", "qwen2", "falcon", "gpt_neox", "gemma3_text", "phi", "stablelm"]


def _empty(model: PreTrainedModel) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(model.config)


@torch.no_grad()
def _reads(model: PreTrainedModel, num_tokens: int) -> bool:
    ids = torch.randint(3, 200, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    try:
        model(ids, use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("family", TABLES)
def test_a_table_of_positions_ends_where_the_model_does(family: str) -> None:
    model = tiny_decoder(family)
    limit = position_limit(_empty(model))
    assert limit == MAX_POSITIONS
    assert _reads(model, limit)
    assert not _reads(model, limit + 1)


@pytest.mark.parametrize("family", COMPUTED)
def test_computed_positions_go_on_beyond_what_the_config_names(family: str) -> None:
    model = tiny_decoder(family)
    assert context_length(model) == MAX_POSITIONS
    assert position_limit(_empty(model)) is None
    assert _reads(model, MAX_POSITIONS + 1)


def test_alibi_names_no_length() -> None:
    model = tiny_decoder("bloom")
    assert (context_length(model), position_limit(_empty(model))) == (None, None)
    assert _reads(model, MAX_POSITIONS + 1)
