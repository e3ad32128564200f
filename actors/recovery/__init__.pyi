from .check import cache_obstacle, check_recovery
from .objectives import OBJECTIVES, Objective, build_causal_lm, find_objective
from .training.local import recover_locally
from .training.train_context import TrainContext
from .training.train_loop import train
from .training.training_data import check_data, check_vocabulary, training_data

__all__ = [
    "OBJECTIVES",
    "Objective",
    "TrainContext",
    "build_causal_lm",
    "cache_obstacle",
    "check_data",
    "check_recovery",
    "check_vocabulary",
    "find_objective",
    "recover_locally",
    "train",
    "training_data",
]
