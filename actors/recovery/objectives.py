"""What recovery optimises: one row an objective."""

from collections.abc import Callable
from dataclasses import dataclass

from peft import PeftModel
from torch import nn

from actors.contracts import RecoverySpec
from actors.errors import unknown_name
from actors.recovery.distillation import LockstepDistiller

BuildModule = Callable[[PeftModel, RecoverySpec, tuple[int, ...]], nn.Module]
"""(adapted source model, spec, kept source layers) → module whose forward(input_ids_BT)
returns a dict of scalar terms with their weighted sum under `loss`."""


@dataclass(frozen=True)
class Objective:
    """`build` is None where nothing is trained."""

    build: BuildModule | None
    paper: str


def build_lockstep(adapted: PeftModel, spec: RecoverySpec, kept: tuple[int, ...]) -> nn.Module:
    """Knowledge distillation from the unpruned model."""
    return LockstepDistiller(adapted, kept, spec.loss)


OBJECTIVES: dict[str, Objective] = {
    "kd": Objective(build_lockstep, "IteRABRe §3.2"),
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
