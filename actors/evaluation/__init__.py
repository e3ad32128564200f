"""Evaluation: perplexity and lm-eval tasks of a model on a trajectory."""

from actors.evaluation.evaluate import evaluate, evaluate_model
from actors.evaluation.harness import check_task_data, check_tasks, evaluate_tasks
from actors.evaluation.perplexity import Perplexity, token_perplexity
from actors.evaluation.suites import SUITES, retentions, suite_tasks

__all__ = [
    "Perplexity",
    "SUITES",
    "check_task_data",
    "check_tasks",
    "evaluate",
    "evaluate_model",
    "evaluate_tasks",
    "retentions",
    "suite_tasks",
    "token_perplexity",
]
