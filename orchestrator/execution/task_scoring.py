"""Scoring by evaluation: every model with one layer less is measured on a task (`task_metric`)."""

from collections.abc import Callable, Iterable, Sequence

from actors import models, scoring
from actors.contracts import (
    EvaluationResult,
    EvaluationSpec,
    Progress,
    ScoreResult,
    ScoreSpec,
    TaskSpec,
)

EvaluateAll = Callable[[Sequence[EvaluationSpec]], Iterable[tuple[int, EvaluationResult]]]
"""Evaluates specs in any order; gives each result with the spec's position as soon as it is there."""


def score_by_task(spec: ScoreSpec, evaluate_all: EvaluateAll, progress: Progress) -> ScoreResult:
    """Evaluate `spec.model` without each of its layers and rank the layers by the task's metric.

    Raises:
        RequestError: the task has no such metric, known after the first candidate.
    """
    assert spec.task is not None, "the plan gives task_metric its task"
    model = spec.model
    left = model.kept(models.describe_model(model.source).num_layers)
    layers = models.removable_layers(model.source, model.dropped, left)
    candidates = [_evaluation(spec, spec.task, layer) for layer in layers]
    values: dict[int, float] = {}
    for position, result in evaluate_all(candidates):
        values[layers[position]] = scoring.task_value(spec.task, result)
        progress(len(values), len(layers), "candidates")
    return scoring.task_scores(spec.model, spec.task, values, spec.protected)


def _evaluation(spec: ScoreSpec, task: TaskSpec, layer: int) -> EvaluationSpec:
    return EvaluationSpec(
        model=spec.model.without((layer,)),
        tasks=(task.name,),
        include_path=task.include_path,
        limit=task.limit,
        num_fewshot=task.num_fewshot,
        apply_chat_template=task.apply_chat_template,
        system_instruction=task.system_instruction,
        batch_size=task.batch_size,
        tasks_fingerprint=task.tasks_fingerprint,
        seed=spec.seed,
    )
