"""Evaluation on Ray."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actors.contracts import (
    ActorPoolSpec,
    EvaluationResult,
    EvaluationSpec,
    ModelRef,
    Progress,
    common_base,
    no_progress,
)
from actors.evaluation.batch_size import batch_sizes
from actors.out_of_memory import once_more_with_less
from actors.ray_pool import ActorPool, result_of, run_in_task, task_name

if TYPE_CHECKING:
    from actors.evaluation.layer_sweep import PruningEvaluator
    from actors.evaluation.lm_eval.language_models import Responder

SHARDS_PER_ACTOR = 8
"""More shards than actors, so that a fast actor takes over from a slow or lost one."""

RETRIES = 3
"""Retries by Ray of a whole evaluation, on the actor restarted on another node, when its machine is lost."""


class EvalActor:
    """Loads the model that a spec names and measures it."""

    def __init__(self) -> None:
        self._respond: Responder | None = None
        self._prunings: PruningEvaluator | None = None

    def evaluate(
        self,
        spec: EvaluationSpec,
        progress: Progress = no_progress,
        samples_uri: str | None = None,
        parts_uri: str | None = None,
    ) -> EvaluationResult:
        """Measure `spec.model` on the GPU this actor was given, or else on its CPUs.

        `progress` crosses to the actor's process, so it must pickle; to be called
        in another process, give one that sends to an actor handle it holds.
        """
        from actors.evaluation.evaluate import evaluate_model

        return evaluate_model(spec, progress, samples_uri, parts_uri)

    def evaluate_pruning(self, spec: EvaluationSpec, base: ModelRef) -> EvaluationResult:
        """Measure `spec.model`, a pruning of `base`, which is kept: every call must name the same."""
        if self._prunings is None:
            from actors.evaluation.layer_sweep import PruningEvaluator

            self._prunings = PruningEvaluator(base)
        return self._prunings.evaluate(spec)

    def respond(self, spec: EvaluationSpec, kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Return the responses of `spec.model` to lm-eval's requests.

        The model is kept, so every call must name the same.
        """
        if self._respond is None:
            from actors.evaluation.lm_eval.language_models import local_responder
            from actors.models import build_model, places

            model, tokenizer = build_model(spec.model, places())
            self._respond = local_responder(model, tokenizer, spec.batch_size, spec.max_length)
        return self._respond(kind, arguments)


def evaluate_on_ray(
    spec: EvaluationSpec,
    pool: ActorPoolSpec,
    progress: Progress = no_progress,
    samples_uri: str | None = None,
    parts_uri: str | None = None,
) -> EvaluationResult:
    """Evaluate on a pool of actors; begin as soon as one of them has a place.

    The requests of all tasks are divided among them; lm-eval's own aggregation runs once,
    over all responses. Texts, probes and throughput are measured by one of the
    actors meanwhile. What is lost with a machine alone is done again on another. What is kept in
    `parts_uri` was measured by an earlier call that did not come to its end.

    Raises:
        WorkError: no actor got a place in time, or all were lost.
        MemoryExhaustedError: memory does not suffice, with half of the batch neither.
    """
    alone = pool.actors == 1 or not spec.tasks
    pool = replace(pool, actors=1) if alone else pool

    def evaluate(spec: EvaluationSpec) -> EvaluationResult:
        with ActorPool(pool, EvalActor, setting="evaluation", progress=progress) as actors:
            if alone:
                ((_, result),) = actors.dispatch(
                    [spec],
                    submit=lambda actor, spec: actor.evaluate.options(**task_name()).remote(
                        spec, progress, samples_uri, parts_uri
                    ),
                )
                return result
            # A process of its own: lm-eval redirects its process's output and sets its random states.
            return run_in_task(_evaluate_on_pool, spec, actors, samples_uri, parts_uri, progress=progress)

    return once_more_with_less(evaluate, **batch_sizes(spec))


def _evaluate_on_pool(
    spec: EvaluationSpec, pool: ActorPool, samples_uri: str | None, parts_uri: str | None, progress: Progress
) -> EvaluationResult:
    """Build the requests, have `pool` respond to them, aggregate the responses."""
    from actors.evaluation.evaluate import measure_tasks, tasks_in_words
    from actors.evaluation.kept_parts import KeptParts, KeptResponses
    from actors.evaluation.lm_eval.language_models import UNITS, check_chat_template
    from actors.evaluation.lm_eval.task_folder import check_tasks_unchanged
    from actors.evaluation.lm_eval.task_loading import check_task_data
    from actors.models import load_tokenizer

    check_task_data(spec.tasks, spec.include_path, spec.num_fewshot)
    check_tasks_unchanged(spec)
    tokenizer = load_tokenizer(spec.model.source)
    if spec.apply_chat_template:
        check_chat_template(tokenizer, spec.system_instruction)
    evaluating = pool.first.evaluate.options(max_task_retries=RETRIES, **task_name())
    without_tasks = evaluating.remote(replace(spec, tasks=(), suites=()), no_progress, samples_uri, parts_uri)

    def respond(kind: str, requests: list[tuple[Any, ...]]) -> list[Any]:
        responses = KeptResponses(KeptParts(parts_uri), kind, requests)
        missing = responses.missing
        size = -(-len(missing) // (len(pool) * SHARDS_PER_ACTOR)) or 1
        shards = [missing[first : first + size] for first in range(0, len(missing), size)]
        done = len(requests) - len(missing)
        for shard, found in pool.dispatch(
            range(len(shards)),
            submit=lambda actor, shard: actor.respond.options(**task_name()).remote(
                spec, kind, [requests[at] for at in shards[shard]]
            ),
            busy=without_tasks,
        ):
            responses.add(shards[shard], found)
            done += len(found)
            progress(done, len(requests), f"{UNITS[kind]} of {tasks_in_words(spec)}")
        return responses.in_order()

    tasks = measure_tasks(spec, respond, tokenizer, samples_uri)
    if spec.perplexity or spec.probes or spec.throughput:
        progress(0, 1, "texts, probes and throughput, on one actor")
    others = result_of(without_tasks)
    return replace(
        tasks,
        metrics=(*others.metrics, *tasks.metrics),
        num_parameters=others.num_parameters,
        versions=(*others.versions, *tasks.versions),
    )


def evaluate_all_on_ray(
    specs: Sequence[EvaluationSpec], pool: ActorPoolSpec, progress: Progress = no_progress
) -> Iterator[tuple[int, EvaluationResult]]:
    """Yield the position and the result of each spec, when done; one model on each actor at a time.

    Their models must be prunings of one, which each actor loads once.
    Begins as soon as one actor has a place. An evaluation whose machine is lost is begun again.

    Raises:
        WorkError: no actor got a place in time, or all were lost.
    """
    base = common_base([spec.model for spec in specs])
    pool = replace(pool, actors=min(pool.actors, len(specs)))
    with ActorPool(pool, EvalActor, setting="evaluation", progress=progress) as actors:
        yield from actors.dispatch(
            range(len(specs)),
            submit=lambda actor, position: actor.evaluate_pruning.options(
                max_task_retries=RETRIES, **task_name()
            ).remote(specs[position], base),
        )
