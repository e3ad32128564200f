"""Evaluation on Ray."""

import ray

from actors.contracts import EvaluationResult, EvaluationSpec, Progress, no_progress
from actors.evaluation.evaluate import evaluate
from actors.models import device, materialize
from actors.models.actor import placement, result_of, wait_for_place


class EvalActor:
    """Loads the model that a spec names and measures it; the caller's `.options` set its resources."""

    def ready(self) -> bool:
        """Answers once the actor has been placed."""
        return True

    def evaluate(self, spec: EvaluationSpec, progress: Progress = no_progress) -> EvaluationResult:
        """Measure `spec.model` on the GPU this actor was given, or else on its CPUs.

        `progress` crosses to the actor's process, so it must pickle; to be told
        in another process, give one that sends to an actor handle it holds.
        """
        model, tokenizer = materialize(spec.model)
        return evaluate(model.to(device()), tokenizer, spec, progress)


def evaluate_on_ray(
    spec: EvaluationSpec,
    *,
    cpus: float,
    gpus: float,
    start_timeout_s: float,
    progress: Progress = no_progress,
) -> EvaluationResult:
    """Evaluate on an actor of its own, begun again elsewhere if its machine is lost.

    Raises:
        WorkError: the actor got no place within `start_timeout_s`.
    """
    options = {**placement(cpus, gpus), "max_restarts": 3, "max_task_retries": 3}
    actor = ray.remote(EvalActor).options(**options).remote()
    try:
        wait_for_place([actor.ready.remote()], "evaluation", cpus, gpus, start_timeout_s)
        return result_of(actor.evaluate.remote(spec, progress))
    finally:
        ray.kill(actor)
