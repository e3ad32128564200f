"""The truth test of surgery: a pruned model is the unpruned one with those blocks skipped."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.errors import RequestError
from actors.models import remove_layers, save_pretrained, without_layers
from tests.support.tiny_models import FAMILIES, blocks_of, skipped, tiny_ids, tiny_model

REFUSED = ("diffllama", "gemma4_text")
PRUNABLE = [family for family in FAMILIES if family not in REFUSED]
DROPS = [(0,), (3,), (5,), (4, 1, 2)]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


@torch.no_grad()
def _cached_logits(model: PreTrainedModel, ids: Tensor, prompt: int) -> Tensor:
    """The prompt at once, then token by token, each with the cache of those before."""
    output = model(ids[:, :prompt], use_cache=True)
    logits = [output.logits]
    for token in ids[:, prompt:].split(1, dim=1):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def _greedy_without_cache(model: PreTrainedModel, ids: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        ids = torch.cat([ids, _logits(model, ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def _pruned_and_reloaded(family: str, drop: Sequence[int], directory: Path) -> PreTrainedModel:
    save_pretrained(remove_layers(tiny_model(family), drop), directory)
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.mark.parametrize("drop", DROPS, ids=str)
@pytest.mark.parametrize("family", PRUNABLE)
def test_pruned_equals_skipped(family: str, drop: tuple[int, ...], tmp_path: Path) -> None:
    source, ids = tiny_model(family), tiny_ids()
    with skipped(source, drop):
        want = _logits(source, ids)
        torch.testing.assert_close(_cached_logits(source, ids, prompt=7), want, **TOLERANCE)
    assert (want - _logits(source, ids)).abs().max() > 0.1

    pruned = remove_layers(tiny_model(family), drop)
    torch.testing.assert_close(_logits(pruned, ids), want, **TOLERANCE)
    torch.testing.assert_close(_cached_logits(pruned, ids, prompt=7), want, **TOLERANCE)

    reloaded = _pruned_and_reloaded(family, drop, tmp_path)
    assert len(blocks_of(reloaded)) == 6 - len(drop)
    torch.testing.assert_close(_logits(reloaded, ids), want, **TOLERANCE)
    torch.testing.assert_close(_cached_logits(reloaded, ids, prompt=7), want, **TOLERANCE)


@pytest.mark.parametrize("family", PRUNABLE)
def test_pruned_models_generate(family: str, tmp_path: Path) -> None:
    drop, source, ids = (0, 4), tiny_model(family), tiny_ids(num_tokens=8)
    with skipped(source, drop):
        want = _greedy_without_cache(source, ids, steps=5)
    reloaded = _pruned_and_reloaded(family, drop, tmp_path)
    reloaded.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    assert reloaded.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False).equal(want)


def test_pruning_twice_equals_pruning_once() -> None:
    once = remove_layers(tiny_model("gemma2"), [1, 2, 5])
    twice = remove_layers(remove_layers(tiny_model("gemma2"), [2]), [1, 4])
    assert _logits(once, tiny_ids()).equal(_logits(twice, tiny_ids()))
    assert once.config.to_dict() == twice.config.to_dict()


@pytest.mark.parametrize(
    ("family", "drop", "want"),
    [
        ("llama", [1, 3], {"num_hidden_layers": 4}),
        ("gpt2", [1, 3], {"n_layer": 4}),
        ("gemma2", [1, 3, 4], {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
        ("olmo3", [0, 2, 4], {"layer_types": ["full_attention"] * 3}),
        ("smollm3", [1, 3, 4], {"no_rope_layers": [1, 0, 1]}),
        ("qwen3_moe", [0, 3, 5], {"mlp_only_layers": [0, 2]}),
    ],
)
def test_per_layer_fields_are_rewritten(
    family: str, drop: list[int], want: dict[str, Any], tmp_path: Path
) -> None:
    save_pretrained(remove_layers(tiny_model(family), drop), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in want} == want


@pytest.mark.parametrize(
    ("family", "overrides", "trait"),
    [
        ("diffllama", {}, "self_attn.lambda_init"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attn.scaling"),
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}, "mlp"),
        ("gemma4_text", {}, "embed_tokens_per_layer"),
    ],
)
def test_what_a_config_cannot_say_is_refused_before_anything_changes(
    family: str, overrides: dict[str, Any], trait: str
) -> None:
    model = tiny_model(family, **overrides)
    before, config, blocks = _logits(model, tiny_ids()), model.config.to_dict(), list(blocks_of(model))
    with pytest.raises(RequestError, match=trait) as refused:
        remove_layers(model, [2])
    assert family in str(refused.value)
    assert list(blocks_of(model)) == blocks
    assert model.config.to_dict() == config
    assert _logits(model, tiny_ids()).equal(before)
    torch.testing.assert_close(_cached_logits(model, tiny_ids(), prompt=3), before, **TOLERANCE)


def test_a_rule_on_the_index_does_not_matter_where_no_index_shifts(tmp_path: Path) -> None:
    source, ids = tiny_model("diffllama"), tiny_ids()
    with skipped(source, [5]):
        want = _logits(source, ids)
    reloaded = _pruned_and_reloaded("diffllama", [5], tmp_path)
    torch.testing.assert_close(_logits(reloaded, ids), want, **TOLERANCE)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([6], "no layer 6: the model has layers 0 to 5"),
        ([-1], "no layer -1"),
        ([2, 3, 2], "listed twice"),
        (range(6), "dropping all 6 layers"),
    ],
)
def test_wrong_indices_are_refused(layers: Sequence[int], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(RequestError, match=message):
        remove_layers(model, layers)
    assert len(blocks_of(model)) == model.config.num_hidden_layers == 6


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_a_model_without_layers_shares_the_weights_of_its_source(family: str) -> None:
    source, ids = tiny_model(family), tiny_ids()
    before = source(ids).logits
    view = without_layers(source, [0, 2])
    assert {p.data_ptr() for p in view.parameters()} < {p.data_ptr() for p in source.parameters()}
    torch.testing.assert_close(view(ids).logits, remove_layers(tiny_model(family), [0, 2])(ids).logits)
    torch.testing.assert_close(source(ids).logits, before, rtol=0, atol=0)
    assert source.config.num_hidden_layers == 6
    assert view.config.num_hidden_layers == 4
    generated = view.generate(ids, max_new_tokens=4, do_sample=False)
    assert source.generate(ids, max_new_tokens=4, do_sample=False).shape == generated.shape
