"""Perplexity against a loop that predicts one token at a time."""

import math

import pytest
import torch
from torch import LongTensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from actors.errors import RequestError
from actors.evaluation import perplexity, token_perplexity
from tests.support.tiny_models import tiny_llama

VOCAB = 300


def naive_nats(model: PreTrainedModel, ids: LongTensor, context: int) -> list[float]:
    """-log p of every predicted token: each from a forward pass over its own prefix."""
    nats = []
    for start in range(0, len(ids), context):
        window = ids[start : start + context]
        for t in range(1, len(window)):
            with torch.no_grad():
                logits = model(window[None, :t], use_cache=False).logits[0, -1].double()
            nats.append(-(logits[window[t]] - logits.logsumexp(0)).item())
    return nats


def tiny_gemma2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.2,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
    )
    return GPT2LMHeadModel(config).eval()


MODELS = {"llama": lambda: tiny_llama(num_layers=2)[0], "gpt2": tiny_gpt2, "gemma2": tiny_gemma2}


def tokens(count: int) -> LongTensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("count", "batch_size"), [(24, 2), (22, 8), (17, 1), (5, 4)])
def test_equals_the_naive_loop(family: str, count: int, batch_size: int) -> None:
    model, ids = MODELS[family](), tokens(count)
    expected = naive_nats(model, ids, context=8)
    measured = token_perplexity(model, ids, context=8, batch_size=batch_size)
    assert measured.num_tokens == len(expected) == count - math.ceil(count / 8)
    assert measured.loss_nats == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert measured.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)


def test_chunks_of_positions_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_llama()[0], tokens(64)
    whole = token_perplexity(model, ids, context=32)
    monkeypatch.setattr(perplexity, "_CHUNK", 5)
    assert token_perplexity(model, ids, context=32).loss_nats == pytest.approx(whole.loss_nats, rel=1e-7)


def test_soft_capped_logits_are_taken_in_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family's own head, without the logits of a whole window."""
    model, ids = tiny_gemma2(), tokens(64)
    whole = token_perplexity(model, ids, context=64)
    positions: list[int] = []
    model.lm_head.register_forward_hook(lambda _head, _args, logits: positions.append(logits.shape[1]))
    monkeypatch.setattr(perplexity, "_CHUNK", 10)
    assert token_perplexity(model, ids, context=64).loss_nats == pytest.approx(whole.loss_nats, rel=1e-7)
    assert max(positions) == 10


def test_a_head_that_cannot_be_run_by_itself_is_run_with_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_gemma2(), tokens(22)
    expected = token_perplexity(model, ids, context=8)
    monkeypatch.setattr(perplexity, "_head_stands_alone", lambda *_: False)
    assert token_perplexity(model, ids, context=8).loss_nats == pytest.approx(expected.loss_nats, rel=1e-7)


def test_progress_counts_windows() -> None:
    reported: list[tuple[int, int, str]] = []
    token_perplexity(tiny_llama()[0], tokens(20), 4, 2, progress=lambda *step: reported.append(step))
    assert reported == [(done, 5, "windows") for done in (0, 2, 4, 5)]


def test_wrong_lengths_are_refused() -> None:
    model, _ = tiny_llama()
    with pytest.raises(RequestError, match="context of 4096 tokens is more than the 512 positions"):
        token_perplexity(model, tokens(10), context=4096)
    with pytest.raises(RequestError, match="at least 2 tokens, not 1"):
        token_perplexity(model, tokens(10), context=1)
    with pytest.raises(RequestError, match="the text has 1"):
        token_perplexity(model, tokens(1), context=8)
