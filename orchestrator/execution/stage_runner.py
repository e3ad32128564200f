"""Runs the stages of a trajectory: each one is computed once, in this process or on Ray.

A stage is looked up in the store by its key; if it is not there, the backend
computes it and it is committed. Its numbers go to the ledger either way, under a
name that makes writing them twice harmless.
"""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from functools import partial
from threading import Lock
from typing import Any, Protocol, TypeVar

from actors import models
from actors.contracts import (
    BLOCK,
    ArtifactRef,
    EvaluationResult,
    EvaluationSpec,
    ExportResult,
    ExportSpec,
    GenerationResult,
    GenerationSpec,
    ModelRef,
    Progress,
    RecoveryResult,
    RecoverySpec,
    ScoreResult,
    ScoreSpec,
    TextSpec,
    no_progress,
)
from actors.errors import WorkError
from orchestrator.execution.progress import Activity, Report, StageProgress
from orchestrator.planning.keys import stage_key
from orchestrator.planning.plan import TrajectoryPlan, num_stages
from orchestrator.planning.pruning_schedule import IterationPlan
from orchestrator.scheduling.coordinator import Claims
from orchestrator.storage.ledger import Ledger, Row
from orchestrator.storage.stage_store import Store, StoredStage

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
Numbers = Iterable[tuple[str, float, str, dict[str, Any]]]
"""Metric, value, unit and further ledger fields of each measured number."""


OnIteration = Callable[[int, Mapping[str, float]], None]
"""Called at the end of each iteration with its index and the metrics of its recovered model."""


class Backend(Protocol):
    """Where a stage that is not in the store is computed."""

    def score(self, spec: ScoreSpec, progress: Progress) -> ScoreResult: ...

    def generate(self, spec: GenerationSpec, uri: str, progress: Progress) -> GenerationResult: ...

    def recover(self, spec: RecoverySpec, uri: str, key: str, progress: Progress) -> RecoveryResult: ...

    def evaluate(self, spec: EvaluationSpec, progress: Progress) -> EvaluationResult: ...

    def export(self, spec: ExportSpec, uri: str) -> ExportResult: ...


class StoredStages:
    """The stages of one trajectory, each found in the store or computed by the backend.

    Args:
        claims: keeps other trajectories from computing the same stage meanwhile.
        on_iteration: told what an iteration's model came to; may end the trajectory.
        overlap: evaluate in the background of what follows, one model at a time.
    """

    def __init__(
        self,
        plan: TrajectoryPlan,
        store: Store,
        backend: Backend,
        report: Report,
        claims: Claims,
        on_iteration: OnIteration | None = None,
        overlap: bool = False,
    ):
        self._plan = plan
        self._claims = claims
        self._on_iteration = on_iteration
        self._recovered: dict[str, float] = {}
        self._store = store
        self._backend = backend
        self._ledger = Ledger(store.ledger_uri)
        self._report = report
        self._responses: ArtifactRef | None = None
        self._counting = Lock()
        self._background = ThreadPoolExecutor(1, "evaluation") if overlap else None
        self._evaluations: deque[tuple[Future[None], Callable[[], None]]] = deque()
        self.activity = Activity(plan.id, 0, len(plan.iterations), "starting", stages_total=num_stages(plan))

    def score(self, iteration: IterationPlan, model: ModelRef) -> Sequence[int]:
        """Source layers of `model`, from the first to remove to the last."""
        spec = self._plan.score_spec(model, iteration.layers_to_drop)
        stage = self._once(
            iteration,
            "score",
            spec,
            ScoreResult,
            lambda progress, _uri, _key: self._backend.score(spec, progress),
        )
        self._write(iteration, stage, _score_numbers(stage.result))
        return removal_order(self._plan, iteration, model, stage.result)

    def prune(self, iteration: IterationPlan, model: ModelRef, source_layers: Sequence[int]) -> ModelRef:
        """`model` without those layers; nothing is computed, the choice is recorded."""
        scored = self._stored_scores(iteration, model)
        pruned = model.pruned(self._plan.granularity, tuple(source_layers)).merged(scored.merges)
        scores = dict(zip(scored.source_layers, scored.scores, strict=True))
        numbers = [("dropped", scores[layer], "", {"layer": layer}) for layer in source_layers]
        key = stage_key("prune", self._plan.key_inputs(pruned))
        self._append(iteration, "prune", key, None, [*numbers, ("layers", iteration.layers_left, "", {})])
        self._count(reused=False)
        return pruned

    def recover(self, iteration: IterationPlan, model: ModelRef) -> ModelRef:
        """`model`, healed: by what its recovery starts with, if anything, then by its objective."""
        data = self._recovery_data(iteration)
        if self._plan.method.recovery.start is not None:
            model = self._heal(iteration, self._plan.start_spec(model, data), "start")
        return self._heal(iteration, self._plan.recovery_spec(model, data))

    def _recovery_data(self, iteration: IterationPlan) -> TextSpec:
        """What recovery trains on; the unpruned model's responses are generated before the first."""
        spec = self._plan.generation_spec()
        if spec is None:
            return self._plan.recovery_text
        if self._responses is None:
            stage = self._once(
                iteration,
                "generate",
                spec,
                GenerationResult,
                lambda progress, uri, _key: self._backend.generate(spec, uri, progress),
            )
            self._write(iteration, stage, _generation_numbers(stage.result))
            self._responses = stage.artifact
        assert self._responses is not None, "generation leaves its responses"
        return spec.responses(self._responses)

    def _heal(self, iteration: IterationPlan, spec: RecoverySpec, phase: str | None = None) -> ModelRef:
        stage = self._once(
            iteration,
            "recover",
            spec,
            RecoveryResult,
            lambda progress, uri, key: self._backend.recover(spec, uri, key, progress),
        )
        self._write(iteration, stage, _recovery_numbers(stage.result), phase)
        return spec.with_recovery(stage.artifact)

    def evaluate(self, iteration: IterationPlan, model: ModelRef, phase: str) -> None:
        """Measure `model`, now or in the background; the numbers go to the ledger."""
        measure = partial(self._evaluate, iteration, model, phase)
        if self._background is None:
            measure()
        else:
            self._evaluations.append((self._background.submit(measure), measure))

    def wait(self) -> None:
        """Return when all evaluations are finished.

        One that failed in the background, for want of a place perhaps, is tried once more by itself.
        """
        while self._evaluations:
            finished, measure = self._evaluations.popleft()
            try:
                finished.result()
            except WorkError as error:
                log.warning("%s: an evaluation in the background failed: %s", self._plan.id, error)
                measure()

    def _evaluate(self, iteration: IterationPlan, model: ModelRef, phase: str) -> None:
        spec = self._plan.evaluation_spec(model)
        stage = self._once(
            iteration,
            "evaluate",
            spec,
            EvaluationResult,
            lambda progress, _uri, _key: self._backend.evaluate(spec, progress),
        )
        self._write(iteration, stage, _evaluation_numbers(stage.result), phase)
        metrics = {metric.name: metric.value for metric in stage.result.metrics}
        if phase == "recovered":
            self._recovered = metrics
        if phase != "pruned":
            with self._counting:
                self.activity = dataclasses.replace(self.activity, perplexities=_perplexities(metrics))

    def export(self, iteration: IterationPlan, model: ModelRef) -> None:
        """Write `model` as a Hugging Face directory, with its card and provenance."""
        from orchestrator.export.model_card import model_card, provenance

        self.wait()  # the card tells what was measured
        rows = self._ledger.read(f"{self._plan.id}-").to_pylist()
        spec = ExportSpec(
            model,
            card=model_card(self._plan, iteration, model, rows),
            provenance=provenance(self._plan, iteration, model, rows),
        )
        uri = self._store.models_uri(self._plan.id, iteration.layers_left, self._plan.unit)
        stage = self._once(
            iteration,
            "export",
            spec,
            ExportResult,
            lambda _progress, _uri, _key: self._backend.export(spec, uri),
        )
        numbers: list[tuple[str, float, str, dict[str, Any]]] = [
            ("parameters", stage.result.num_parameters, "", {}),
            ("layers", stage.result.num_layers, "", {}),
        ]
        if emptied := stage.result.num_zeroed_parameters:
            numbers.append(("parameters_in_use", stage.result.num_parameters - emptied, "", {}))
        self._write(iteration, stage, numbers)

    def finish(self, iteration: IterationPlan) -> None:
        """Tell how the iteration's model is, if measured; whoever listens may end the trajectory here."""
        if self._on_iteration is not None and iteration.is_measured:
            self.wait()
            self._on_iteration(iteration.index, self._recovered)

    def _once(
        self,
        iteration: IterationPlan,
        kind: str,
        spec: Any,
        result_type: type[ResultT],
        compute: Callable[[Progress, str, str], ResultT],
    ) -> StoredStage[ResultT]:
        """The stage's result from the store, or computed now, by one trajectory alone, and committed."""
        inputs = self._plan.key_inputs(spec)
        key = stage_key(kind, inputs)
        progress: Progress = no_progress
        if kind != "evaluate" or self._background is None:  # what is in the background is not told of
            with self._counting:
                self.activity = dataclasses.replace(self.activity, iteration=iteration.index, stage=kind)
            progress = StageProgress(self._report, self.activity)
        if stored := self._store.load(kind, key, result_type):
            self._count(reused=True)
            return stored
        self._claims.take(kind, key, self.activity.stages_total - self.activity.stages_done)
        seconds = 0.0
        try:
            # Another trajectory may have finished it while this one waited.
            if stored := self._store.load(kind, key, result_type):
                self._count(reused=True)
                return stored
            log.info("%s iteration %d: %s %s starts", self._plan.id, iteration.index, kind, key[:12])
            started = time.monotonic()
            try:
                result = compute(progress, self._store.payload_uri(kind, key, time.time_ns()), key)
            finally:
                seconds = time.monotonic() - started
            stage = self._store.commit(kind, key, result, inputs, _artifact(result), seconds)
        finally:
            self._claims.give_back(key, seconds)
        log.info(
            "%s iteration %d: %s %s took %.1f s", self._plan.id, iteration.index, kind, key[:12], seconds
        )
        self._count(reused=False)
        return stage

    def _count(self, reused: bool) -> None:
        with self._counting:
            now = self.activity
            self.activity = dataclasses.replace(
                now, stages_done=now.stages_done + 1, stages_reused=now.stages_reused + reused
            )
        self._report(self.activity)

    def _stored_scores(self, iteration: IterationPlan, model: ModelRef) -> ScoreResult:
        inputs = self._plan.key_inputs(self._plan.score_spec(model, iteration.layers_to_drop))
        stage = self._store.load("score", stage_key("score", inputs), ScoreResult)
        assert stage is not None, "a model is scored before it is pruned"
        return stage.result

    def _write(
        self, iteration: IterationPlan, stage: StoredStage[Any], numbers: Numbers, phase: str | None = None
    ) -> None:
        numbers = [*numbers, ("seconds", stage.seconds, "s", {})]
        self._append(iteration, stage.kind, stage.key, phase, numbers, stage.created_at, stage.host)

    def _append(
        self,
        iteration: IterationPlan,
        kind: str,
        key: str,
        phase: str | None,
        numbers: Numbers,
        created_at: str | None = None,
        host: str | None = None,
    ) -> None:
        """Write a stage's numbers to the ledger, once."""
        part = f"{self._plan.id}-{iteration.index:03d}-{kind}-{phase or 'all'}-{key[:16]}"
        if self._ledger.has(part):
            return
        common: dict[str, Any] = {
            "campaign": self._plan.campaign,
            "trajectory": self._plan.id,
            "model": self._plan.model_id,
            "method": self._plan.method.name,
            "seed": self._plan.seed,
            "iteration": iteration.index,
            "stage": kind,
            "phase": phase,
            "key": key,
        }
        if created_at and host:
            common |= {"when": datetime.fromisoformat(created_at), "where": host}
        rows = [Row(**common, metric=m, value=float(v), unit=u, **more) for m, v, u, more in numbers]
        self._ledger.append(part, rows)


def removal_order(
    plan: TrajectoryPlan, iteration: IterationPlan, model: ModelRef, scored: ScoreResult
) -> Sequence[int]:
    """The removal order, with layers in front that the model's config lets go together."""
    order = scored.removal_order
    if plan.any_layers or plan.granularity != BLOCK or scored.merges:
        return order
    count = iteration.layers_to_drop
    chosen = models.choose_removable(model.source, model.dropped, order, count)
    if chosen != order[:count]:
        log.warning(
            "%s iteration %d: the config of the model cannot be without layers %s, which score best; "
            "layers %s go, the best that it can be without",
            plan.id, iteration.index, list(order[:count]), list(chosen),
        )  # fmt: skip
    return (*chosen, *(layer for layer in order if layer not in chosen))


def _score_numbers(result: ScoreResult) -> Numbers:
    for layer, score in zip(result.source_layers, result.scores, strict=True):
        yield "score", score, "", {"layer": layer}
    yield "layer_forwards", result.layer_forwards, "", {}
    if result.layer_forwards_saved:
        yield "layer_forwards_saved", result.layer_forwards_saved, "", {}
    yield "sequences", result.num_sequences, "", {}
    yield "tokens", result.num_tokens, "tokens", {}


def _generation_numbers(result: GenerationResult) -> Numbers:
    yield "prompts", result.num_prompts, "", {}
    yield "responses", result.num_responses, "", {}
    yield "responses_finished", result.num_finished, "", {}
    yield "tokens", result.num_tokens, "tokens", {}


def _recovery_numbers(result: RecoveryResult) -> Numbers:
    for record in result.steps:
        at = {"step": record.step}
        yield "loss", record.loss, "", at
        for name, value in record.terms:
            yield f"loss_{name}", value, "", at
        yield "learning_rate", record.learning_rate, "", at
        yield "grad_norm", record.grad_norm, "", at
        yield "step_seconds", record.seconds, "s", at
        yield "step_tokens", record.tokens, "tokens", at
        yield "tokens_per_second", record.tokens / record.seconds, "tokens/s", at
        yield "peak_memory", record.peak_memory_bytes, "bytes", at
    yield "tokens", result.tokens, "tokens", {}
    yield "trainable_parameters", result.trainable_parameters, "", {}


def _evaluation_numbers(result: EvaluationResult) -> Numbers:
    for metric in result.metrics:
        yield metric.name, metric.value, metric.unit, {"stderr": metric.stderr}
    yield "parameters", result.num_parameters, "", {}


def _perplexities(metrics: Mapping[str, float]) -> dict[str, float]:
    """Token perplexities by the name of their text."""
    ending = "/token_perplexity"
    return {name.removesuffix(ending): value for name, value in metrics.items() if name.endswith(ending)}


def _artifact(result: Any) -> ArtifactRef | None:
    """What a stage published: responses, an adapter, an exported directory; some stages only measure."""
    return getattr(result, "artifact", None)
