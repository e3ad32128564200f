"""Evaluation: perplexity, lm-eval tasks, probes and throughput of a model on a trajectory."""

from actors.evaluation.evaluate import evaluate
from actors.evaluation.harness import check_tasks, evaluate_tasks
from actors.evaluation.perplexity import Perplexity, token_perplexity
from actors.evaluation.probes import PROBES, check_probes

__all__ = [
    "PROBES",
    "Perplexity",
    "check_probes",
    "check_tasks",
    "evaluate",
    "evaluate_tasks",
    "token_perplexity",
]
