"""Attention or MLP taken out of single blocks; `test_decoder_families` tries it on every family."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.contracts import ExportSpec, ModelRef, ModelSpec
from actors.errors import RequestError
from actors.models import (
    LayerwisePass,
    export_model,
    load_model,
    prune_checkpoint,
    remove_layers,
    save_pretrained,
    sub_block_weights,
    without_sub_block,
    zero_sub_blocks,
)
from tests.support.decoder_zoo import tiny_decoder
from tests.support.surgery_truth import branch_off
from tests.support.tiny_models import blocks_of, save_tiny, tiny_ids, tiny_model, tiny_tokenizer


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon"])
def test_a_block_without_its_sub_block(family: str, kind: str) -> None:
    """As if the branch gave nothing; afterwards the weights are what they were."""
    model, ids = tiny_model(family), tiny_ids(1)
    layerwise, block = LayerwisePass(model, ids), blocks_of(model)[2]
    whole = layerwise.block(2, layerwise.hidden_BTD)
    with branch_off(block, kind, family):
        want = layerwise.block(2, layerwise.hidden_BTD)
    with without_sub_block(block, kind):
        got = layerwise.block(2, layerwise.hidden_BTD)
    torch.testing.assert_close(got, want)
    assert (got - whole).abs().max() > 0.01
    assert torch.equal(layerwise.block(2, layerwise.hidden_BTD), whole)


def test_only_the_weights_of_the_sub_block_are_zero() -> None:
    model, before = tiny_model("llama"), tiny_model("llama").state_dict()
    zero_sub_blocks(model, "mlp", [1, 4])
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    projections = ("gate_proj", "up_proj", "down_proj")
    assert changed == {f"model.layers.{i}.mlp.{part}.weight" for i in (1, 4) for part in projections}
    assert all(model.state_dict()[name].count_nonzero() == 0 for name in changed)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bert", r"layer 0 \(BertLayer\) changes the residual stream even without attention and MLP"),
        ("openai-gpt", "no checkpoint can leave out its attention alone"),
        ("nemotron_h", r"layer 0 has no attention of its own \(it holds norm, mixer\); remove whole blocks"),
        ("gemma3n_text", "num_kv_shared_layers"),
    ],
)
def test_families_that_cannot_are_refused_and_left_as_they_are(model_type: str, message: str) -> None:
    model = tiny_decoder(model_type)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RequestError, match=message):
        zero_sub_blocks(model, "attention", [0])
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "layers", "message"),
    [("attention", [6], "no layer 6"), ("mlp", [1, 1], "listed twice")],
)
def test_wrong_layers_are_refused(kind: str, layers: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        zero_sub_blocks(tiny_model("llama"), kind, layers)


@torch.no_grad()
def test_a_reference_drops_layers_and_empties_by_source_layer(tmp_path: Path) -> None:
    """Layer 3 of the source is the second that is left; the export says how much adds nothing."""
    source = ModelSpec(save_tiny(tmp_path / "model"))
    ref = ModelRef(source).pruned("block", (1, 2)).pruned("attention", (3,)).pruned("mlp", (0,))
    assert ref.zeroed == ((0, "mlp"), (3, "attention"))
    assert ref.candidates("attention", 4) == (0,)
    assert ref.candidates("block", 4) == (0, 3)
    exported = export_model(ExportSpec(ref), str(tmp_path / "out"))

    model, _ = load_model(source.path)
    with (
        branch_off(blocks_of(model)[3], "attention", "llama"),
        branch_off(blocks_of(model)[0], "mlp", "llama"),
    ):
        remove_layers(model, [1, 2])
        want = model(tiny_ids(), use_cache=False).logits
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(reloaded(tiny_ids(), use_cache=False).logits, want)
    weights = [*sub_block_weights(blocks_of(model)[1], "attention").values()]
    weights += sub_block_weights(blocks_of(model)[0], "mlp").values()
    assert exported.num_zeroed_parameters == sum(weight.numel() for weight in weights)
    assert exported.num_layers == 2


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "mixtral"])
def test_zeroed_on_disk_equals_zeroed_in_memory(family: str, kind: str, tmp_path: Path) -> None:
    """Experts are stored one by one (qwen3_moe), and under other names than the model's (mixtral)."""
    model = tiny_model(family)
    save_pretrained(model, tmp_path / "model", tokenizer=tiny_tokenizer())
    prune_checkpoint(str(tmp_path / "model"), [1, 4], tmp_path / "out", granularity=kind)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    want = zero_sub_blocks(model, kind, [1, 4]).state_dict()
    assert got.keys() == want.keys()
    assert all(got[name].equal(want[name]) for name in want)


def test_blocks_that_hand_on_more_than_hidden_states_are_not_run_alone() -> None:
    with pytest.raises(RequestError, match=r"a block \(ZayaDecoderLayer\) goes on with more than the hidden"):
        LayerwisePass(tiny_decoder("zaya"), tiny_ids(1))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bert", "xlnet", "bloom"])
def test_a_layerwise_pass_is_the_model(model_type: str) -> None:
    """An encoder within the decoder, and blocks that return more than anyone goes on with."""
    model, ids = tiny_decoder(model_type), tiny_ids(1)
    layerwise = LayerwisePass(model, ids)
    hidden = layerwise.hidden_BTD
    for index in range(6):
        hidden = layerwise.block(index, hidden)
    torch.testing.assert_close(layerwise.logits(hidden, torch.arange(12)), model(ids, use_cache=False).logits)
