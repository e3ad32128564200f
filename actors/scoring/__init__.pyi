from .criteria import (
    CRITERIA,
    Criterion,
    FixedCriterion,
    LayerCriterion,
    MergeCriterion,
    TaskCriterion,
    find_criterion,
)
from .measures.pooling import POOLING
from .score import Scorer, score_layers, score_locally
from .task_metric import task_scores, task_value

__all__ = [
    "CRITERIA",
    "POOLING",
    "Criterion",
    "FixedCriterion",
    "LayerCriterion",
    "MergeCriterion",
    "Scorer",
    "TaskCriterion",
    "find_criterion",
    "score_layers",
    "score_locally",
    "task_scores",
    "task_value",
]
