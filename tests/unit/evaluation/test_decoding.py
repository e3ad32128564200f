"""Greedy decoding against taking the likeliest token of the logits, one after another."""

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from actors.contracts import GenerationSpec, ModelSpec, TextSpec
from actors.evaluation.probes.decoding import respond
from actors.generation.transformers import generate_responses
from actors.models.decoding import plain_greedy
from tests.support.tiny_models import tiny_llama

NEW_TOKENS = 12
SHIPPED = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.1,
    "typical_p": 0.5,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 3e-4,
    "repetition_penalty": 1.3,
    "encoder_repetition_penalty": 1.2,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 9,
    "suppress_tokens": list(range(3, 150)),
    "begin_suppress_tokens": list(range(150, 299)),
    "bad_words_ids": [[5]],
    "forced_eos_token_id": 2,
    "sequence_bias": [[[7], 30.0]],
    "num_beams": 3,
    "length_penalty": 2.0,
    "guidance_scale": 1.5,
    "renormalize_logits": True,
    "max_length": 3,
}
"""What a generation_config.json may hold; each of these but the last changes what is likeliest."""


def likeliest(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """The likeliest tokens after `ids`, by running the whole sequence again for each."""
    sequence = list(ids)
    for _ in range(NEW_TOKENS):
        sequence.append(model(torch.tensor([sequence]), use_cache=False).logits[0, -1].argmax().item())
        if sequence[-1] == model.config.eos_token_id:
            break
    return sequence[len(ids) :]


@torch.no_grad()
@pytest.mark.parametrize("name", [*SHIPPED, "all"])
def test_the_models_generation_config_changes_no_token(name: str) -> None:
    model, tokenizer = tiny_llama()
    model.generation_config = GenerationConfig(
        eos_token_id=2, pad_token_id=0, **(SHIPPED if name == "all" else {name: SHIPPED[name]})
    )
    own = model.generation_config
    prompts = ["The quick brown fox", "Ancient"]
    found = respond(model, tokenizer, prompts, NEW_TOKENS)
    for prompt, response in zip(prompts, found, strict=True):
        expected = likeliest(model, tokenizer(prompt).input_ids)
        assert list(response.tokens) == [token for token in expected if token != 2]
    assert model.generation_config is own


@torch.no_grad()
def test_responses_for_recovery_do_not_heed_it_either() -> None:
    model, tokenizer = tiny_llama()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    spec = GenerationSpec(model=ModelSpec("m"), prompts=TextSpec(), max_new_tokens=NEW_TOKENS)
    prompt = ({"role": "user", "content": "The lazy dog"},)
    (expected,) = generate_responses(model, tokenizer, [prompt], spec)
    model.generation_config = GenerationConfig(
        eos_token_id=2, **{k: v for k, v in SHIPPED.items() if k != "do_sample"}
    )
    assert generate_responses(model, tokenizer, [prompt], spec) == [expected]


def test_a_failed_generation_leaves_the_models_configuration() -> None:
    model, _ = tiny_llama()
    own = model.generation_config
    with pytest.raises(RuntimeError, match="no memory"), plain_greedy(model, max_new_tokens=1):
        raise RuntimeError("no memory")
    assert model.generation_config is own
