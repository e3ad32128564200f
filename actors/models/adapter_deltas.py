"""Updates of single weights by LoRA adapters, without the model around them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from actors.artifacts import fetch
from actors.contracts import ArtifactRef
from actors.errors import RequestError

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Deltas:
    """Low-rank updates of the blocks that are left.

    Attributes:
        factors: A [r, in] and B [out, r] by block and weight, e.g. (4, "self_attn.o_proj.weight").
        scale: of the product.
        transposed: weights are kept as [in, out].
    """

    factors: Mapping[tuple[int, str], tuple[Tensor, Tensor]]
    scale: float
    transposed: bool

    @property
    def rank(self) -> int:
        """The largest r."""
        return max((len(a) for a, _ in self.factors.values()), default=0)

    def update(self, block: int, name: str, device: torch.device) -> Tensor:
        """Return the update of this block's weight, in float32 and as the weight is kept."""
        a, b = (factor.to(device) for factor in self.factors[block, name])
        delta = self.scale * (b @ a)
        return delta.T if self.transposed else delta


@torch.no_grad()
def add_deltas(weight: Tensor, chain: Sequence[Deltas], block: int, name: str) -> None:
    """Add the chain's updates of this block's weight to it in place.

    They are summed in float32 and the sum is rounded once: in bfloat16, one addition after the other
    would lose more of each.
    """
    updating = [deltas for deltas in chain if (block, name) in deltas.factors]
    if updating:
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for deltas in updating:
            total += deltas.update(block, name, weight.device)
        weight.copy_(total)


def join_deltas(chain: Sequence[Deltas]) -> Deltas:
    """Return the chain's updates as one: s₁ B₁ A₁ + s₂ B₂ A₂ = [s₁ B₁, s₂ B₂] [A₁; A₂].

    All weights get the same rank, the sum of the chain's; zeros stand where an adapter has none.
    """
    joined = {}
    for place in sorted({place for deltas in chain for place in deltas.factors}):
        present = [(deltas.scale, *deltas.factors[place]) for deltas in chain if place in deltas.factors]
        a = torch.cat([a for _, a, _ in present])
        b = torch.cat([scale * b for scale, _, b in present], dim=1)
        missing = sum(deltas.rank for deltas in chain) - len(a)
        joined[place] = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    return Deltas(joined, 1.0, any(deltas.transposed for deltas in chain))


def read_deltas(adapter: ArtifactRef, layers_path: str, kept: tuple[int, ...]) -> Deltas:
    """Return the updates of an adapter whose tensors are named by source layer index; see `plain_deltas`.

    Raises:
        RequestError: the adapter is more than plain LoRA on the blocks.
    """
    deltas = plain_deltas(adapter, layers_path, kept)
    if deltas is None:
        raise RequestError(
            f"adapter {adapter.uri!r} is more than plain LoRA on the layers: its model can neither be "
            "streamed (set scoring.stream_weights to false) nor trained on"
        )
    return deltas


def plain_deltas(adapter: ArtifactRef, layers_path: str, kept: tuple[int, ...]) -> Deltas | None:
    """Return the updates of an adapter whose tensors are named by source layer index.

    None if the adapter is more than plain LoRA on matrices of the blocks: weight-decomposed, of a rank
    or scale that differs between layers, or with weights of other kinds or elsewhere.

    Args:
        layers_path: where the blocks are in the model, e.g. `model.layers`.
        kept: source index of each block that is left.
    """
    directory = fetch(adapter)
    config = LoraConfig.from_pretrained(str(directory))
    pattern = re.compile(rf"(?:.*\.)?{re.escape(layers_path)}\.(\d+)\.(.+)\.lora_([AB])\.weight")
    factors: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in load_file(directory / ADAPTER_WEIGHTS).items():
        match = pattern.fullmatch(name)
        uneven = config.use_dora or config.rank_pattern or config.alpha_pattern
        if match is None or uneven or tensor.dim() != 2:
            return None
        layer, weight, factor = int(match[1]), f"{match[2]}.weight", match[3]
        if layer in kept:
            factors.setdefault((kept.index(layer), weight), {})[factor] = tensor.to(torch.float32)
    rank = math.sqrt(config.r) if config.use_rslora else config.r
    pairs = {place: (both["A"], both["B"]) for place, both in factors.items()}
    return Deltas(pairs, config.lora_alpha / rank, bool(config.fan_in_fan_out))
