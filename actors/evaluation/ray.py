"""Evaluation on Ray."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from actors.contracts import EvaluationResult, EvaluationSpec, Progress, no_progress
from actors.ray_pool import conducted, placement, result_of, share_out, wait_for_place

if TYPE_CHECKING:
    from actors.evaluation.lm_eval.harness import Answer

SHARES_PER_ACTOR = 8
"""More shares than actors, so that a fast actor takes over from a slow or lost one."""


class EvalActor:
    """Loads the model that a spec names and measures it; the caller's `.options` set its resources."""

    def __init__(self) -> None:
        self._answer: Answer | None = None

    def ready(self) -> bool:
        """Answers once the actor has been placed."""
        return True

    def evaluate(self, spec: EvaluationSpec, progress: Progress = no_progress) -> EvaluationResult:
        """Measure `spec.model` on the GPU this actor was given, or else on its CPUs.

        `progress` crosses to the actor's process, so it must pickle; to be told
        in another process, give one that sends to an actor handle it holds.
        """
        from actors.evaluation.evaluate import evaluate_model

        return evaluate_model(spec, progress)

    def answer(self, spec: EvaluationSpec, kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Answers of `spec.model` to lm-eval's requests; the model is kept, so every call names the same."""
        if self._answer is None:
            from actors.evaluation.lm_eval.harness import answering
            from actors.models import device, materialize

            model, tokenizer = materialize(spec.model)
            self._answer = answering(model.to(device()), tokenizer, spec.batch_size, spec.max_length)
        return self._answer(kind, arguments)


def evaluate_on_ray(
    spec: EvaluationSpec,
    *,
    actors: int = 1,
    cpus: float,
    gpus: float,
    start_timeout_s: float,
    progress: Progress = no_progress,
) -> EvaluationResult:
    """Evaluate on up to `actors` actors of its own; begins as soon as one of them has a place.

    The requests of all tasks are shared out; lm-eval's own aggregation runs once,
    over all answers. Texts, probes and throughput are measured by one of the
    actors meanwhile. What is lost with a machine alone is done again elsewhere.

    Raises:
        WorkError: no actor got a place within `start_timeout_s`, or all were lost.
    """
    alone = actors == 1 or not spec.tasks
    pool = [_start(cpus, gpus, retries=3 if alone else 0) for _ in range(1 if alone else actors)]
    try:
        placed = {actor.ready.remote(): actor for actor in pool}
        wait_for_place(list(placed), "evaluation", cpus, gpus, start_timeout_s)
        if alone:
            return result_of(pool[0].evaluate.remote(spec, progress))
        (first,), later = ray.wait(list(placed), num_returns=1)
        ordered = [placed[first], *(placed[ready] for ready in later)]
        return conducted(_conduct, spec, ordered, progress)
    finally:
        for actor in pool:
            ray.kill(actor)


def _conduct(spec: EvaluationSpec, pool: list[ActorHandle], progress: Progress) -> EvaluationResult:
    """Build the requests, have `pool` answer them, aggregate the answers.

    A process of its own: lm-eval redirects output and sets random states for
    the whole process it runs in.
    """
    from actors.evaluation.evaluate import measure_tasks
    from actors.evaluation.lm_eval.harness import check_chat_template, check_task_data
    from actors.evaluation.lm_eval.task_folder import check_tasks_unchanged
    from actors.models import load_tokenizer

    check_task_data(spec.tasks, spec.include_path, spec.num_fewshot)
    check_tasks_unchanged(spec)
    tokenizer = load_tokenizer(spec.model.source)
    if spec.apply_chat_template:
        check_chat_template(tokenizer)
    besides = replace(spec, tasks=(), suites=())
    rest = pool[0].evaluate.options(max_task_retries=3).remote(besides)

    def answer(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        size = -(-len(arguments) // (len(pool) * SHARES_PER_ACTOR))
        shares = [arguments[first : first + size] for first in range(0, len(arguments), size)]
        parts: dict[int, list[Any]] = {}
        for share, part in share_out(
            pool,
            range(len(shares)),
            "evaluation",
            give=lambda actor, share: actor.answer.remote(spec, kind, shares[share]),
            busy=rest,
        ):
            parts[share] = part
            progress(len(parts), len(shares), kind)
        return [found for share in range(len(shares)) for found in parts[share]]

    metrics, versions = measure_tasks(spec, answer, tokenizer)
    others = result_of(rest)
    return replace(
        others,
        metrics=(*others.metrics, *metrics),
        versions=(*others.versions, *versions),
    )


def evaluate_all_on_ray(
    specs: Sequence[EvaluationSpec], *, actors: int, cpus: float, gpus: float, start_timeout_s: float
) -> Iterator[tuple[int, EvaluationResult]]:
    """Evaluate many models on up to `actors` actors; each result comes with its spec's position, when done.

    Begins as soon as one actor has a place. An evaluation whose machine is lost is begun again.

    Raises:
        WorkError: no actor got a place within `start_timeout_s`.
    """
    pool = [_start(cpus, gpus, retries=3) for _ in range(min(actors, len(specs)))]
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


def _start(cpus: float, gpus: float, retries: int) -> ActorHandle:
    """An actor that comes back when lost; Ray then gives it what it was at work on up to `retries` times."""
    options = {**placement(cpus, gpus), "max_restarts": 3, "max_task_retries": retries}
    return ray.remote(EvalActor).options(**options).remote()
