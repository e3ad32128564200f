"""Evaluation: perplexity, lm-eval tasks, probes and throughput of a model on a trajectory."""

from actors.evaluation.evaluate import evaluate, evaluate_model
from actors.evaluation.harness import check_task_data, check_tasks, evaluate_tasks
from actors.evaluation.perplexity import Perplexity, token_perplexity
from actors.evaluation.probes import PROBES, Probe, check_probes
from actors.evaluation.suites import SUITES, suite_tasks

__all__ = [
    "PROBES",
    "Perplexity",
    "Probe",
    "SUITES",
    "check_probes",
    "check_task_data",
    "check_tasks",
    "evaluate",
    "evaluate_model",
    "evaluate_tasks",
    "suite_tasks",
    "token_perplexity",
]
