"""To what depths a model is taken, and in what portions."""

import math
from dataclasses import dataclass

from actors.contracts import ModelInfo
from orchestrator.config import TargetConfig
from orchestrator.errors import RequestError


@dataclass(frozen=True)
class IterationPlan:
    """One round of score, prune, recover, evaluate."""

    index: int
    layers_to_drop: int
    layers_left: int
    is_target: bool


def iterative_schedule(num_layers: int, depths: list[int], portion: int) -> tuple[IterationPlan, ...]:
    """Portions of layers from `num_layers` down to the smallest of `depths`, halting at each of them."""
    iterations: list[IterationPlan] = []
    left = num_layers
    for depth in depths:
        while left > depth:
            drop = min(portion, left - depth)
            left -= drop
            iterations.append(IterationPlan(len(iterations) + 1, drop, left, left == depth))
    return tuple(iterations)


def target_depth(target: TargetConfig, info: ModelInfo) -> int:
    """Layers that remain at a target.

    Raises:
        RequestError: not between 1 and one less than the model's depth.
    """
    if target.layers is not None:
        depth, asked = target.layers, f"layers: {target.layers}"
    else:
        share = target.fraction or 0.0
        # Halves round up: Python's round() would take 2.5 layers as 2.
        depth, asked = info.num_layers - math.floor(share * info.num_layers + 0.5), f"fraction: {share}"
    if not 1 <= depth < info.num_layers:
        raise RequestError(
            f"target {asked} leaves {depth} of the {info.num_layers} layers of {info.spec.path!r}; "
            f"it must leave between 1 and {info.num_layers - 1}"
        )
    return depth
