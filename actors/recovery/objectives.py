"""What recovery optimises: one row an objective."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from actors.contracts import RecoverySpec
from actors.data import TrainingData
from actors.errors import unknown_name
from actors.recovery.bridge import Solution, solve_bridges
from actors.recovery.distillation import LockstepDistiller
from actors.recovery.pair import Pair

BuildModule = Callable[[Pair, RecoverySpec], nn.Module]
"""Gives the module to train: forward(batch: TokenBatch) → dict of scalar terms, their weighted sum
under `loss`, each the sum over the batch's tokens divided by `batch.denominator`."""


Solve = Callable[[RecoverySpec, TrainingData], Solution]
"""Gives tensors in the place of the model's own, found in closed form."""


@dataclass(frozen=True)
class Objective:
    """`build` is None where nothing is trained; `solve` is given where there is a closed form."""

    build: BuildModule | None
    paper: str
    solve: Solve | None = None


def build_lockstep(pair: Pair, spec: RecoverySpec) -> nn.Module:
    """Knowledge distillation from the unpruned model."""
    return LockstepDistiller(pair, spec.loss)


OBJECTIVES: dict[str, Objective] = {
    "kd": Objective(build_lockstep, "IteRABRe §3.2"),
    "linear_bridge": Objective(None, "ReplaceMe (arXiv 2505.02819) §2.2", solve=solve_bridges),
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
