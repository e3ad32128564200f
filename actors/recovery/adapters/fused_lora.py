"""LoRA's linear layers with fewer passes over memory than PEFT's own forward.

PEFT adds the low-rank part as separate tensors, scaled, cast and summed, forward
and backward, and computes it in the adapter's own type, for weights in bfloat16
a slow one. Here y = x Wᵀ + (x Aᵀ) Bᵀ is one autograd node that adds in place
and computes in the type of W; A and B and their gradients keep theirs.

N tokens, I inputs, O outputs, R ranks of all active adapters together.
"""

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


def use_fused_forward(layers: Iterable[LoraLayer]) -> None:
    """Give plain LoRA layers without dropout the forward of this module; others keep PEFT's."""
    for layer in layers:
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if (
            type(layer) is Linear
            and type(layer.base_layer) is nn.Linear
            and not layer.base_layer.weight.requires_grad
            and not any(layer.lora_bias.values())
            and not layer.lora_variant
            and all(isinstance(layer.lora_dropout[name], nn.Identity) for name in names)
        ):
            layer.forward = MethodType(_forward, layer)


def _forward(layer: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return layer.base_layer(x)
    base = layer.base_layer
    # DeepSpeed's third stage gathers weights in hooks of the modules that hold them.
    if x.dtype != base.weight.dtype or hasattr(base.weight, "ds_id"):
        return Linear.forward(layer, x, *args, **kwargs)
    down_RI = torch.cat([layer.lora_A[name].weight for name in names])
    up_OR = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], dim=1)
    return _LowRankLinear.apply(x, base.weight, base.bias, down_RI.to(x.dtype), up_OR.to(x.dtype))


class _LowRankLinear(torch.autograd.Function):
    """x Wᵀ + b + (x Aᵀ) Bᵀ with W and b frozen."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor
    ) -> Tensor:
        inner_NR = x.flatten(0, -2) @ down_RI.T
        # What is returned is no view: a family may change it in place.
        y = nn.functional.linear(x, weight_OI, bias_O)
        y.flatten(0, -2).addmm_(inner_NR, up_OR.T)
        ctx.save_for_backward(x, weight_OI, down_RI, up_OR, inner_NR)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        x, weight_OI, down_RI, up_OR, inner_NR = ctx.saved_tensors
        above_NO, x_NI = above.flatten(0, -2), x.flatten(0, -2)
        inner_above_NR = above_NO @ up_OR
        x_above = None
        if ctx.needs_input_grad[0]:
            x_above = (above_NO @ weight_OI).addmm_(inner_above_NR, down_RI).view(x.shape)
        return x_above, None, None, inner_above_NR.T @ x_NI, above_NO.T @ inner_NR
