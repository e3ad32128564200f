"""Healing a pruned model by a short distillation from the unpruned one."""

from actors.recovery.check import check_recovery
from actors.recovery.feed import check_data
from actors.recovery.local import recover_locally
from actors.recovery.objectives import OBJECTIVES, Objective, build_causal_lm, find_objective
from actors.recovery.train_loop import train
from actors.recovery.workplace import Workplace

__all__ = [
    "OBJECTIVES",
    "Objective",
    "Workplace",
    "build_causal_lm",
    "check_data",
    "check_recovery",
    "find_objective",
    "recover_locally",
    "train",
]
