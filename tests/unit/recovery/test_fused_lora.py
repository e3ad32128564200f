"""The short forward of LoRA layers against PEFT's own."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from actors.recovery.adapters.fused_lora import use_fused_forward
from actors.recovery.adapters.lora import adapters_disabled, lora_layers

MERGED, FACTORS = 16, 3
"""Ranks of an earlier adapter, which takes more memory than a copy of the weight, or less."""


def _adapted(
    dtype: torch.dtype = torch.float32, bias: bool = True, dropout: float = 0.0, earlier: int = FACTORS
) -> nn.Module:
    """Two linear layers, each under a trained adapter and a frozen earlier one of another rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.Tanh(), nn.Linear(40, 16, bias=bias)).to(dtype)
    config = {"target_modules": ["0", "2"], "lora_dropout": dropout, "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=2, **config), adapter_name="current")
    adapted.add_adapter("earlier", LoraConfig(r=earlier, lora_alpha=3 * earlier, **config))
    adapted.base_model.set_adapter(["earlier", "current"])
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(".current." in name)
    return adapted


def _short(adapted: nn.Module) -> nn.Module:
    short = copy.deepcopy(adapted)
    use_fused_forward(lora_layers(short))
    return short


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model(x).float().square().sum().backward()
    return [x.grad, *[p.grad for p in model.parameters() if p.requires_grad]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("earlier", [MERGED, FACTORS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_outputs_and_gradients_are_those_of_peft(
    bias: bool, dtype: torch.dtype, tolerance: float, earlier: int
) -> None:
    plain = _adapted(dtype, bias, earlier=earlier)
    short = _short(plain)
    short(torch.randn(2, 24, dtype=dtype))
    merged = [layer._frozen_part[1].update is None for layer in lora_layers(short)]
    assert merged == [earlier == MERGED] * 2
    x = torch.randn(2, 5, 24, dtype=dtype)
    assert float((short(x) - plain(x)).norm() / plain(x).norm()) < tolerance
    pairs = [_gradients(model, x.clone().requires_grad_()) for model in (short, plain)]
    for mine, theirs in zip(*pairs, strict=True):
        assert mine.dtype == theirs.dtype
        assert float((mine - theirs).norm() / theirs.norm()) < 2 * tolerance


def test_the_switch_leaves_the_frozen_weights_alone() -> None:
    short, x = _short(_adapted()), torch.randn(5, 24)
    with adapters_disabled(lora_layers(short)):
        off = short(x)
    layers = lora_layers(short)
    torch.testing.assert_close(off, layers[1].base_layer(torch.tanh(layers[0].base_layer(x))))
    assert float((short(x) - off).detach().norm()) > 1


@pytest.mark.parametrize("earlier", [MERGED, FACTORS])
def test_earlier_adapters_are_the_students_alone(earlier: int) -> None:
    short, x = _short(_adapted(earlier=earlier)), torch.randn(5, 24)
    on = short(x).detach()
    with adapters_disabled(lora_layers(short)):
        off = short(x).detach()
    assert float((on - off).norm()) > 1
    torch.testing.assert_close(short(x).detach(), on, rtol=0, atol=0)


def test_layers_with_dora_keep_pefts_forward() -> None:
    config = LoraConfig(r=4, use_dora=True, target_modules=["0"])
    adapted = get_peft_model(nn.Sequential(nn.Linear(24, 40)), config, adapter_name="current")
    assert all("forward" not in vars(layer) for layer in lora_layers(_short(adapted)))


def test_layers_with_dropout_keep_pefts_forward() -> None:
    short = _short(_adapted(dropout=0.5))
    assert all("forward" not in vars(layer) for layer in lora_layers(short))
