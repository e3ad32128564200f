"""Scoring the layers of a model as candidates for removal."""

from actors.scoring.criteria import CRITERIA, Criterion, find_criterion
from actors.scoring.pooling import POOLING
from actors.scoring.score import Scorer, score_layers, score_locally

__all__ = ["CRITERIA", "POOLING", "Criterion", "Scorer", "find_criterion", "score_layers", "score_locally"]
