"""Evaluation: perplexity and lm-eval tasks of a model on a trajectory."""

from actors.evaluation.evaluate import evaluate
from actors.evaluation.harness import check_tasks, evaluate_tasks
from actors.evaluation.perplexity import Perplexity, token_perplexity

__all__ = ["Perplexity", "check_tasks", "evaluate", "evaluate_tasks", "token_perplexity"]
