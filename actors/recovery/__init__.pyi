from .check import check_recovery
from .feed import check_data
from .local import recover_locally
from .objectives import OBJECTIVES, Objective, build_causal_lm, find_objective
from .train_loop import train
from .workplace import Workplace

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
