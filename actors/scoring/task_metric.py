"""`task_metric`: the next layer to go is the one that an lm-eval task misses least.

Greedy, one layer after another ("Iterative" of On the Limits of Layer Pruning,
arXiv 2602.01997, App. A.6.1). Whole models are evaluated, by `actors.evaluation`; here
is only what its numbers mean for the removal.
"""

from collections.abc import Collection, Mapping

from actors.contracts import EvaluationResult, ModelRef, ScoreResult, TaskSpec
from actors.errors import RequestError
from actors.scoring.criteria import removal_order


def task_value(task: TaskSpec, result: EvaluationResult) -> float:
    """Return the task's metric in an evaluation.

    Raises:
        RequestError: the task has no such metric; names those it has.
    """
    values = {metric.name: metric.value for metric in result.metrics}
    wanted = f"{task.name}/{task.metric}"
    if wanted not in values:
        had = ", ".join(name.removeprefix(f"{task.name}/") for name in sorted(values))
        raise RequestError(f"scoring.task: {task.name!r} has no metric {task.metric!r}; it has {had}")
    return values[wanted]


def task_scores(
    model: ModelRef, task: TaskSpec, values: Mapping[int, float], protected: Collection[int] = ()
) -> ScoreResult:
    """Return the scores, and the order of removal, that the task's values give.

    Args:
        model: the model that was pruned by one layer for each value.
        values: by source layer index, the metric of `model` without that layer.
        protected: source layers that may not go.
    """
    kept = tuple(sorted(values))
    assert not set(kept) & set(model.dropped), "a dropped layer is no candidate"
    scores = tuple(values[layer] for layer in kept)
    stay = [i for i, layer in enumerate(kept) if layer in protected]
    order = removal_order(scores, task.higher_is_better, protected=stay)
    return ScoreResult(kept, scores, tuple(kept[i] for i in order), 0, 0, 0)
