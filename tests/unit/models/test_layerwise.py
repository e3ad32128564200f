"""A pass block by block equals the family's own forward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.models import LayerwisePass
from tests.support.decoder_zoo import tiny_decoder
from tests.support.tiny_models import FAMILIES, blocks_of, tiny_ids, tiny_model

TUPLE_FAMILIES = ("bloom", "falcon", "gptj")


def _own_forward(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """What enters the first block and leaves each, and the last hidden state."""
    states: list[Tensor] = []

    def enter(_block: nn.Module, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def leave(_block: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [blocks_of(model)[0].register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [block.register_forward_hook(leave) for block in blocks_of(model)]
    last = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return states, last


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_the_own_forward(family: str, padded: bool) -> None:
    model, ids, mask = tiny_model(family), tiny_ids(num_sequences=3), None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        mask[2, :4] = 0
    states, last = _own_forward(model, ids, mask)

    layerwise = LayerwisePass(model, ids, mask)
    torch.testing.assert_close(layerwise.hidden_BTD, states[0])
    hidden = layerwise.hidden_BTD
    for index in range(6):
        hidden = layerwise.block(index, hidden)
        torch.testing.assert_close(hidden, states[index + 1])
    torch.testing.assert_close(layerwise.finish(hidden), last)


@pytest.mark.parametrize("family", TUPLE_FAMILIES)
def test_families_that_return_tuples_are_among_the_tested(family: str) -> None:
    seen: list[type] = []
    model = tiny_model(family)
    block = blocks_of(model)[0]
    block.register_forward_hook(lambda _block, _inputs, output: seen.append(type(output)))
    model(tiny_ids())
    assert seen == [tuple]


@torch.no_grad()
def test_any_order_and_any_number_of_blocks() -> None:
    """One pass serves streams that skip blocks: what follows depends on the input alone."""
    model, ids = tiny_model("llama"), tiny_ids()
    layerwise = LayerwisePass(model, ids)
    hidden = layerwise.block(4, layerwise.block(1, layerwise.hidden_BTD))
    blocks = blocks_of(model)
    for index in (0, 2, 3, 5):
        blocks[index].forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    want = model.model(ids, use_cache=False).last_hidden_state
    for index in (0, 2, 3, 5):
        del blocks[index].forward
    torch.testing.assert_close(layerwise.finish(hidden), want)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_model_is_left_as_it_was(family: str) -> None:
    model, ids = tiny_model(family), tiny_ids()
    before = model(ids).logits
    layerwise = LayerwisePass(model, ids)
    layerwise.finish(layerwise.hidden_BTD)
    assert not any("forward" in vars(block) for block in blocks_of(model))
    assert model(ids).logits.equal(before)


def test_looking_at_a_new_family_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed training run, in a fresh process, must see the same dropout."""
    monkeypatch.setattr("actors.models.layerwise._EXTRA_OUTPUTS", {})
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.0).train()
    torch.manual_seed(0)
    LayerwisePass(model, tiny_ids())
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert drawn.equal(torch.rand(1))


def test_gradients_flow_through_blocks_and_norm() -> None:
    model, ids = tiny_model("llama"), tiny_ids()
    layerwise = LayerwisePass(model, ids)
    layerwise.finish(layerwise.block(3, layerwise.hidden_BTD)).square().sum().backward()
    assert model.model.layers[3].mlp.down_proj.weight.grad.abs().sum() > 0
    assert model.model.norm.weight.grad.abs().sum() > 0
    assert model.model.layers[2].mlp.down_proj.weight.grad is None


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
