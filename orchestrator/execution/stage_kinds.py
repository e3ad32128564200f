"""The kinds of stages that compute something: their result, their work on a backend, their numbers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from actors.contracts import (
    SCORE_METRICS,
    EvaluationResult,
    EvaluationSpec,
    ExportResult,
    ExportSpec,
    GenerationResult,
    GenerationSpec,
    Progress,
    RecoveryResult,
    RecoverySpec,
    ScoreResult,
    ScoreSpec,
    TeachResult,
    TeachSpec,
)
from orchestrator.planning.pruning_schedule import IterationPlan

ResultT = TypeVar("ResultT")
Numbers = Iterable[tuple[str, float, str, dict[str, Any]]]
"""Metric, value, unit and further ledger fields of each measured number."""


class Backend(Protocol):
    """Where a stage that is not in the store is computed."""

    def score(self, spec: ScoreSpec, progress: Progress) -> ScoreResult: ...

    def generate(self, spec: GenerationSpec, uri: str, progress: Progress) -> GenerationResult: ...

    def teach(self, spec: TeachSpec, uri: str, progress: Progress) -> TeachResult: ...

    def recover(self, spec: RecoverySpec, uri: str, key: str, progress: Progress) -> RecoveryResult: ...

    def evaluate(self, spec: EvaluationSpec, uri: str, key: str, progress: Progress) -> EvaluationResult: ...

    def export(self, spec: ExportSpec, uri: str, progress: Progress) -> ExportResult: ...


@dataclass(frozen=True)
class StageKind(Generic[ResultT]):
    """A kind of stage.

    Attributes:
        compute: computes the stage on a backend; gets its progress and the URI for its payload.
        numbers: what of the result goes to the ledger.
    """

    name: str
    result_type: type[ResultT]
    compute: Callable[["Backend", "StageRequest[ResultT]", Progress, str], ResultT]
    numbers: Callable[[ResultT], Numbers]


@dataclass(frozen=True)
class StageRequest(Generic[ResultT]):
    """A stage whose result a trajectory needs.

    Attributes:
        key: hash of `inputs`, which are all that the result depends on.
        layers: depth of the model that it works on.
        phase: as in `orchestrator.storage.ledger.Row`.
        background: other stages of the trajectory go on meanwhile.
        beside: keys of all stages that together are the one requested, if it is in parts.
    """

    kind: StageKind[ResultT]
    key: str
    inputs: Any
    spec: Any
    iteration: IterationPlan
    layers: int
    phase: str | None = None
    background: bool = False
    beside: tuple[str, ...] = ()


def score_numbers(result: ScoreResult) -> Numbers:
    for layer, score, kind in zip(result.source_layers, result.scores, result.kind_of_each, strict=True):
        yield SCORE_METRICS[kind], score, "", {"layer": layer}
    yield "layer_forwards", result.layer_forwards, "forwards", {}
    if result.layer_forwards_saved:
        yield "layer_forwards_saved", result.layer_forwards_saved, "forwards", {}
    yield "sequences", result.num_sequences, "", {}
    yield "tokens", result.num_tokens, "tokens", {}


def generation_numbers(result: GenerationResult) -> Numbers:
    yield "prompts", result.num_prompts, "", {}
    yield "responses", result.num_responses, "", {}
    yield "responses_finished", result.num_finished, "", {}
    yield "tokens", result.num_tokens, "tokens", {}


def teaching_numbers(result: TeachResult) -> Numbers:
    yield "sequences", result.num_sequences, "", {}
    yield "tokens", result.num_tokens, "tokens", {}
    yield "stored", result.num_bytes, "bytes", {}


def recovery_numbers(result: RecoveryResult) -> Numbers:
    for record in result.steps:
        at = {"step": record.step}
        yield "loss", record.loss, "", at
        for name, value in record.terms:
            yield f"loss_{name}", value, "", at
        yield "learning_rate", record.learning_rate, "", at
        yield "grad_norm", record.grad_norm, "", at
        yield "step_seconds", record.seconds, "s", at
        yield "step_tokens", record.tokens, "tokens", at
        tokens_per_second = record.tokens / record.seconds
        yield "tokens_per_second", tokens_per_second, "tokens/s", at
        if result.peak_flops:
            yield "mfu", tokens_per_second * result.flops_per_token / result.peak_flops, "", at
        yield "peak_memory", record.peak_memory_bytes, "bytes", at
    yield "tokens", result.tokens, "tokens", {}
    yield "trainable_parameters", result.trainable_parameters, "", {}
    if result.flops_per_token:
        yield "flops_per_token", result.flops_per_token, "", {}
    if result.rows.bad:
        yield "rows", result.rows.read, "", {}
        yield "rows_skipped", result.rows.bad, "", {}


def evaluation_numbers(result: EvaluationResult) -> Numbers:
    for metric in result.metrics:
        yield metric.name, metric.value, metric.unit, {"stderr": metric.stderr}
    yield "parameters", result.num_parameters, "", {}


def export_numbers(result: ExportResult) -> Numbers:
    yield "parameters", result.num_parameters, "", {}
    yield "layers", result.num_layers, "", {}


SCORE = StageKind(
    "score",
    ScoreResult,
    lambda backend, stage, progress, _: backend.score(stage.spec, progress),
    score_numbers,
)
GENERATE = StageKind(
    "generate",
    GenerationResult,
    lambda backend, stage, progress, uri: backend.generate(stage.spec, uri, progress),
    generation_numbers,
)
TEACH = StageKind(
    "teach",
    TeachResult,
    lambda backend, stage, progress, uri: backend.teach(stage.spec, uri, progress),
    teaching_numbers,
)
RECOVER = StageKind(
    "recover",
    RecoveryResult,
    lambda backend, stage, progress, uri: backend.recover(stage.spec, uri, stage.key, progress),
    recovery_numbers,
)
EVALUATE = StageKind(
    "evaluate",
    EvaluationResult,
    lambda backend, stage, progress, uri: backend.evaluate(stage.spec, uri, stage.key, progress),
    evaluation_numbers,
)
EXPORT = StageKind(
    "export",
    ExportResult,
    lambda backend, stage, progress, uri: backend.export(stage.spec, uri, progress),
    export_numbers,
)
