"""Isolation of documents that share a row: which models keep it."""

import pytest

from actors.errors import RequestError
from actors.recovery.training.document_isolation import check_document_isolation
from tests.support.decoder_zoo import tiny_decoder
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "olmo3", "mixtral"])
def test_attention_goes_by_positions(family: str, implementation: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    check_document_isolation(model)


@pytest.mark.parametrize("family", ["bloom", "mamba", "rwkv"])
def test_a_family_that_would_carry_one_document_into_the_next_is_refused(family: str) -> None:
    with pytest.raises(RequestError, match=rf"'{family}'.*recovery\.packing"):
        check_document_isolation(tiny_decoder(family))
