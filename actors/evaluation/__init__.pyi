from .evaluate import evaluate_model, metric_names
from .layer_sweep import evaluate_prunings
from .lm_eval.harness import evaluate_tasks
from .lm_eval.suites import SUITES, suite_tasks
from .lm_eval.task_folder import tasks_fingerprint
from .lm_eval.task_loading import check_task_data, check_tasks, task_names
from .perplexity import Perplexity, token_perplexity
from .probes.probes import PROBES, Probe, check_probes

__all__ = [
    "PROBES",
    "Perplexity",
    "Probe",
    "SUITES",
    "check_probes",
    "check_task_data",
    "check_tasks",
    "evaluate_model",
    "evaluate_prunings",
    "evaluate_tasks",
    "metric_names",
    "suite_tasks",
    "task_names",
    "tasks_fingerprint",
    "token_perplexity",
]
