from .evaluate import evaluate_model
from .harness import check_task_data, check_tasks, evaluate_tasks
from .perplexity import Perplexity, token_perplexity
from .probes import PROBES, Probe, check_probes
from .suites import SUITES, suite_tasks
from .task_folder import tasks_fingerprint

__all__ = [
    "PROBES",
    "Perplexity",
    "Probe",
    "SUITES",
    "check_probes",
    "check_task_data",
    "check_tasks",
    "evaluate_model",
    "evaluate_tasks",
    "suite_tasks",
    "tasks_fingerprint",
    "token_perplexity",
]
