"""What a LoRA adapter adds to single weights, without the model around them."""

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
from actors.models.chain import ADAPTER_WEIGHTS


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

    def add_to(self, weight: Tensor, block: int, name: str) -> None:
        """Add the update of this block's weight, if it has one, in place."""
        if (block, name) not in self.factors:
            return
        a, b = (factor.to(weight.device) for factor in self.factors[block, name])
        delta = self.scale * (b @ a)
        weight += (delta.T if self.transposed else delta).to(weight.dtype)


def join_deltas(chain: Sequence[Deltas]) -> Deltas:
    """The chain's updates as one: s₁ B₁ A₁ + s₂ B₂ A₂ = [s₁ B₁, s₂ B₂] [A₁; A₂].

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
    """The updates of an adapter whose tensors are named by source layer index.

    Args:
        layers_path: where the blocks are in the model, e.g. `model.layers`.
        kept: source index of each block that is left.

    Raises:
        RequestError: the adapter is more than plain LoRA on the blocks.
    """
    directory = fetch(adapter)
    config = LoraConfig.from_pretrained(str(directory))
    pattern = re.compile(rf"(?:.*\.)?{re.escape(layers_path)}\.(\d+)\.(.+)\.lora_([AB])\.weight")
    factors: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in load_file(directory / ADAPTER_WEIGHTS).items():
        match = pattern.fullmatch(name)
        if match is None or config.use_dora or config.rank_pattern or config.alpha_pattern:
            raise RequestError(
                f"adapter {adapter.uri!r} is more than plain LoRA on the layers ({name}): "
                "its model can neither be streamed (set scoring.stream_weights to false) nor trained on"
            )
        layer, weight, factor = int(match[1]), f"{match[2]}.weight", match[3]
        if layer in kept:
            factors.setdefault((kept.index(layer), weight), {})[factor] = tensor.to(torch.float32)
    rank = math.sqrt(config.r) if config.use_rslora else config.r
    pairs = {place: (both["A"], both["B"]) for place, both in factors.items()}
    return Deltas(pairs, config.lora_alpha / rank, bool(config.fan_in_fan_out))
