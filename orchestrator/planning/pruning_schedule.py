"""To what depths a model is taken, and in what portions."""

import math
from dataclasses import dataclass

from actors.contracts import ModelInfo
from orchestrator.config import TargetConfig
from orchestrator.errors import RequestError

EVERY_ITERATION = "every_iteration"


@dataclass(frozen=True)
class IterationPlan:
    """One round of score, prune, recover, evaluate; the last two perhaps at targets only."""

    index: int
    layers_to_drop: int
    layers_left: int
    is_target: bool
    recovers: bool = True
    is_measured: bool = True


def iterative_schedule(
    num_layers: int,
    depths: list[int],
    portion: int,
    recover_at: str = EVERY_ITERATION,
    measure_at: str = EVERY_ITERATION,
) -> tuple[IterationPlan, ...]:
    """Return portions from `num_layers` layers down to the smallest of `depths`, halting at each of them.

    If the full depth is among them, the first iteration drops nothing: it heals the model as it is.
    """
    iterations = [IterationPlan(1, 0, num_layers, True)] if num_layers in depths else []
    left = num_layers
    for depth in depths:
        while left > depth:
            drop = min(portion, left - depth)
            left -= drop
            is_target = left == depth
            recovers, is_measured = (is_target or at == EVERY_ITERATION for at in (recover_at, measure_at))
            index = len(iterations) + 1
            iterations.append(IterationPlan(index, drop, left, is_target, recovers, is_measured))
    return tuple(iterations)


def target_depth(target: TargetConfig, info: ModelInfo) -> int:
    """Return how many layers remain at a target.

    Raises:
        RequestError: none, or more than the model has; or all, where the target does not say so by `layers`.
    """
    if target.layers is not None:
        depth = target.layers
    elif target.fraction is not None:
        # Halves round up: Python's round() would take 2.5 layers as 2.
        depth = info.num_layers - math.floor(target.fraction * info.num_layers + 0.5)
    elif target.parameters is not None:
        depth = _depth_within(target.parameters, info)
    else:
        depth = _depth_within((1 - (target.parameter_fraction or 0.0)) * info.num_parameters, info)
    most = info.num_layers if target.layers is not None else info.num_layers - 1
    if not 1 <= depth <= most:
        raise RequestError(
            f"target {target.name} leaves {depth} of the {info.num_layers} layers of {info.spec.path!r}; "
            f"it must leave between 1 and {most}"
        )
    return depth


def _depth_within(parameters: float, info: ModelInfo) -> int:
    """Return the most layers that, whichever they are, make a model of so many parameters; 0 if none do.

    Blocks may differ in size, and which ones are removed is open yet: the smallest are counted as removed.
    """
    left = info.num_parameters
    for removed, size in enumerate([0, *sorted(info.block_parameters)]):
        left -= size
        if left <= parameters:
            return info.num_layers - removed
    return 0
