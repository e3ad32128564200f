"""LoRA's linear layers with fewer passes over memory than PEFT's own forward.

PEFT adds the low-rank part as separate tensors, scaled, cast and summed, forward
and backward, and computes it in the adapter's own type, for weights in bfloat16
a slow one. Here y = x Wᵀ + (x Aᵀ) Bᵀ is one autograd node that adds in place
and computes in the type of W; A and B and their gradients keep theirs.

Frozen adapters of earlier recoveries cost no gradient of their own. Where a copy of W takes no more memory
than they do, they are summed into one, in float32, and then cost nothing: seven as little as none. The
teacher goes on with W itself.

N tokens, I inputs, O outputs, R ranks of all trained adapters together, F of all frozen ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Frozen:
    """What a layer computes with that is not trained: its weight, and perhaps the factors of an update."""

    weight_OI: Tensor
    update: tuple[Tensor, Tensor] | None = None


def _forward(layer: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return layer.base_layer(x)
    base = layer.base_layer
    # DeepSpeed's third stage gathers weights in hooks of the modules that hold them.
    if x.dtype != base.weight.dtype or hasattr(base.weight, "ds_id"):
        return Linear.forward(layer, x, *args, **kwargs)
    frozen = _frozen(layer, [name for name in names if not layer.lora_A[name].weight.requires_grad])
    trained = [name for name in names if layer.lora_A[name].weight.requires_grad]
    down_RI, up_OR = _factors(layer, trained)
    return _LowRankLinear.apply(x, frozen, base.bias, down_RI.to(x.dtype), up_OR.to(x.dtype))


def _factors(layer: LoraLayer, names: list[str]) -> tuple[Tensor, Tensor]:
    """Return A and B, scaled, of those adapters as one; of rank 0 if there are none."""
    base = layer.base_layer
    down = [layer.lora_A[name].weight for name in names] or [base.weight.new_zeros(0, base.in_features)]
    up = [layer.lora_B[name].weight * layer.scaling[name] for name in names]
    return torch.cat(down), torch.cat(up or [base.weight.new_zeros(base.out_features, 0)], dim=1)


@torch.no_grad()
def _frozen(layer: LoraLayer, names: list[str]) -> _Frozen:
    """Return the layer's frozen part; made once, as long as its weight stays where it is."""
    weight_OI = layer.base_layer.weight
    if not names:
        return _Frozen(weight_OI)
    made_of = (weight_OI.data_ptr(), *names)
    known: tuple[Any, _Frozen] | None = getattr(layer, "_frozen_part", None)
    if known is not None and known[0] == made_of:
        return known[1]
    down_FI, up_OF = _factors(layer, names)
    if weight_OI.nbytes <= down_FI.nbytes + up_OF.nbytes:
        frozen = _Frozen((weight_OI.float() + up_OF.float() @ down_FI.float()).to(weight_OI.dtype))
    else:
        frozen = _Frozen(weight_OI, (down_FI.to(weight_OI.dtype), up_OF.to(weight_OI.dtype)))
    layer._frozen_part = (made_of, frozen)
    return frozen


class _LowRankLinear(torch.autograd.Function):
    """x Wᵀ + b + (x Aᵀ) Bᵀ with W, b and what is in the place of W frozen."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, frozen: _Frozen, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor
    ) -> Tensor:
        x_NI = x.flatten(0, -2)
        inner_NR = x_NI @ down_RI.T
        # What is returned is no view: a family may change it in place.
        y = nn.functional.linear(x, frozen.weight_OI, bias_O)
        y.flatten(0, -2).addmm_(inner_NR, up_OR.T)
        if frozen.update is not None:
            down_FI, up_OF = frozen.update
            y.flatten(0, -2).addmm_(x_NI @ down_FI.T, up_OF.T)
        ctx.save_for_backward(x, down_RI, up_OR, inner_NR)
        ctx.frozen = frozen
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        x, down_RI, up_OR, inner_NR = ctx.saved_tensors
        frozen = ctx.frozen
        above_NO, x_NI = above.flatten(0, -2), x.flatten(0, -2)
        inner_above_NR = above_NO @ up_OR
        x_above = None
        if ctx.needs_input_grad[0]:
            x_above_NI = (above_NO @ frozen.weight_OI).addmm_(inner_above_NR, down_RI)
            if frozen.update is not None:
                down_FI, up_OF = frozen.update
                x_above_NI.addmm_(above_NO @ up_OF, down_FI)
            x_above = x_above_NI.view(x.shape)
        return x_above, None, None, inner_above_NR.T @ x_NI, above_NO.T @ inner_NR
