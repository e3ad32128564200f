"""What recovery optimises: one row an objective."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from actors.contracts import RecoverySpec
from actors.errors import unknown_name
from actors.recovery.distillation import LockstepDistiller
from actors.recovery.pair import Pair

BuildModule = Callable[[Pair, RecoverySpec], nn.Module]
"""Gives the module to train: forward(batch: TokenBatch) → dict of scalar terms, their weighted sum
under `loss`, each the sum over the batch's tokens divided by `batch.denominator`."""


@dataclass(frozen=True)
class Objective:
    """`build` is None where nothing is trained; `weights` names what of `LossSpec` weighs its terms."""

    build: BuildModule | None
    paper: str
    weights: tuple[str, ...] = ()


def build_lockstep(pair: Pair, spec: RecoverySpec) -> nn.Module:
    """Knowledge distillation from the unpruned model."""
    return LockstepDistiller(pair, spec.loss)


OBJECTIVES: dict[str, Objective] = {
    "kd": Objective(build_lockstep, "IteRABRe §3.2", weights=("hidden", "attention", "logits")),
    "none": Objective(None, "pruning without recovery, the control of every paper"),
}


def find_objective(name: str) -> Objective:
    """The row of that name.

    Raises:
        RequestError: there is none.
    """
    if name not in OBJECTIVES:
        raise unknown_name("recovery objective", name, OBJECTIVES)
    return OBJECTIVES[name]
