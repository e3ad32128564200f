from .criteria import CRITERIA, Criterion, find_criterion
from .pooling import POOLING
from .score import Scorer, score_layers, score_locally
from .task_metric import task_scores, task_value

__all__ = [
    "CRITERIA",
    "POOLING",
    "Criterion",
    "Scorer",
    "find_criterion",
    "score_layers",
    "score_locally",
    "task_scores",
    "task_value",
]
