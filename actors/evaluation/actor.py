"""Evaluation on Ray."""

from collections.abc import Iterator, Mapping, Sequence

import ray
from ray.actor import ActorHandle

from actors.contracts import EvaluationResult, EvaluationSpec, Progress, no_progress
from actors.evaluation.evaluate import evaluate_model
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
        return evaluate_model(spec, progress)


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
    actor = _start(cpus, gpus)
    try:
        wait_for_place([actor.ready.remote()], "evaluation", cpus, gpus, start_timeout_s)
        return result_of(actor.evaluate.remote(spec, progress))
    finally:
        ray.kill(actor)


def evaluate_all_on_ray(
    specs: Sequence[EvaluationSpec], *, actors: int, cpus: float, gpus: float, start_timeout_s: float
) -> Iterator[tuple[int, EvaluationResult]]:
    """Evaluate many models on up to `actors` actors; each result comes with its spec's position, when done.

    Begins as soon as one actor has a place. An evaluation whose machine is lost is begun again.

    Raises:
        WorkError: no actor got a place within `start_timeout_s`.
    """
    pool = [_start(cpus, gpus) for _ in range(min(actors, len(specs)))]
    try:
        starting = {actor.ready.remote(): (None, actor) for actor in pool}
        wait_for_place(list(starting), "evaluation", cpus, gpus, start_timeout_s)
        yield from _hand_out(specs, starting)
    finally:
        for actor in pool:
            ray.kill(actor)


def _hand_out(
    specs: Sequence[EvaluationSpec], starting: Mapping[ray.ObjectRef, tuple[int | None, ActorHandle]]
) -> Iterator[tuple[int, EvaluationResult]]:
    """Give every actor a spec whenever it is free; an actor is free when its `ready` has been answered."""
    pending, todo, left = dict(starting), iter(enumerate(specs)), len(specs)
    while left:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        position, actor = pending.pop(done)
        answer = result_of(done)
        if (following := next(todo, None)) is not None:
            pending[actor.evaluate.remote(following[1])] = (following[0], actor)
        if position is not None:
            left -= 1
            yield position, answer


def _start(cpus: float, gpus: float) -> ActorHandle:
    options = {**placement(cpus, gpus), "max_restarts": 3, "max_task_retries": 3}
    return ray.remote(EvalActor).options(**options).remote()
