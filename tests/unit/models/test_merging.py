"""Merged blocks against the sums written out, parameter by parameter."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.errors import RequestError
from actors.models import load_model, save_pretrained
from actors.models.pruning.merging import MERGES, merge_layers
from tests.support.tiny_models import blocks_of, tiny_ids, tiny_model, tiny_tokenizer


def _distinct_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Norms are ones in a fresh model, so that it would not be seen whose they are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def _is_norm(name: str) -> bool:
    return "norm" in name or "ln_" in name


def _want(model: torch.nn.Module, name: str, base: int, count: int, variant: str) -> Tensor:
    values = [dict(block.named_parameters())[name].detach() for block in blocks_of(model)]
    if variant == "in_place":
        value = values[base].clone()
        for k in range(1, count + 1):
            value = value if _is_norm(name) else value + (values[base + k] - value)
        return value
    return values[base] + sum(values[base + k] - values[base] for k in range(1, count + 1))


@pytest.mark.parametrize(("base", "count"), [(0, 1), (0, 5), (2, 2), (4, 1)])
@pytest.mark.parametrize("variant", MERGES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights(family: str, variant: str, base: int, count: int) -> None:
    source = _distinct_norms(tiny_model(family))
    merged = merge_layers(copy.deepcopy(source), base, count, variant)
    left = [i for i in range(6) if not base < i <= base + count]
    assert len(blocks_of(merged)) == len(left)
    for position, layer in enumerate(left):
        for name, value in blocks_of(merged)[position].named_parameters():
            unmerged = dict(blocks_of(source)[layer].named_parameters())[name]
            want = _want(source, name, base, count, variant) if layer == base else unmerged
            torch.testing.assert_close(value, want)


def test_the_variants_differ() -> None:
    """With one following block in the projections not at all, but in the norms; with two in both."""
    first, second = (merge_layers(_distinct_norms(tiny_model("llama")), 1, 1, v) for v in MERGES)
    layers = [model.model.layers[1] for model in (first, second)]
    torch.testing.assert_close(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    assert not torch.allclose(layers[0].input_layernorm.weight, layers[1].input_layernorm.weight)


@pytest.mark.parametrize("variant", MERGES)
def test_a_merged_model_is_saved_and_loaded_like_any(variant: str, tmp_path: Path) -> None:
    model = merge_layers(_distinct_norms(tiny_model("llama")), 1, 2, variant)
    save_pretrained(model, tmp_path, tokenizer=tiny_tokenizer())
    loaded, _ = load_model(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tiny_ids()).logits, model(tiny_ids(), use_cache=False).logits)


@pytest.mark.parametrize(("base", "count"), [(-1, 1), (5, 1), (0, 6), (2, 0)])
def test_blocks_that_are_not_there(base: int, count: int) -> None:
    with pytest.raises(RequestError, match="the model has layers 0 to 5"):
        merge_layers(tiny_model("llama"), base, count)


def test_blocks_of_different_kinds_and_unknown_variants_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(
        RequestError, match="layers 0 and 1 are of different kinds and cannot be merged: 'mlp"
    ):
        merge_layers(model, 0, 1)
    with pytest.raises(RequestError, match="unknown merge 'inplace'; did you mean in_place"):
        merge_layers(model, 0, 1, "inplace")
    assert len(blocks_of(model)) == 6
