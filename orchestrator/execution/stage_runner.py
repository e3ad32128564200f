"""The stages of a trajectory: their specs and keys, and what follows from their results.

A resolver gives the result of each stage. Running a trajectory, counting its stages and looking a
finished model up are the same loop with different resolvers: `ComputeResolver`, `LookUpResolver`
(`orchestrator.execution.resolvers`) and `PlaceholderResolver` (`orchestrator.execution.dry_run`).
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from actors import models
from actors.contracts import (
    ArtifactRef,
    EvaluationSpec,
    FileRef,
    Metric,
    ModelRef,
    RecoverySpec,
    Removal,
    ScoreResult,
    TextSpec,
    digest,
)
from actors.errors import MemoryExhaustedError, TooLargeError
from orchestrator.execution.stage_kinds import (
    EVALUATE,
    GENERATE,
    RECOVER,
    SCORE,
    TEACH,
    ResultT,
    StageKind,
    StageRequest,
)
from orchestrator.planning.keys import stage_key
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.pruning_schedule import IterationPlan

log = logging.getLogger(__name__)

OnIteration = Callable[[int, Mapping[str, float]], None]
"""Called at the end of each iteration with its index and the metrics of its recovered model."""

NOTHING_TO_SCORE = ScoreResult((), (), (), 0, 0, 0)
"""Of an iteration that heals a model as it is."""

NOT_SCORED = ScoreResult((), (), (), 0, 0, 0)
"""In a dry run, the result of a scoring that is not finished."""


class Resolver(Protocol):
    """Gives the results of a trajectory's stages."""

    def resolve(self, stage: StageRequest[ResultT]) -> ResultT:
        """Return the result of a stage."""

    def holds(self, kind: StageKind[Any], key: str) -> bool:
        """Return whether the result of a stage is there."""

    def prune(self, iteration: IterationPlan, pruned: ModelRef, removal: Removal) -> None:
        """Take note of what was removed; nothing is computed for it."""

    def export(self, iteration: IterationPlan, model: ModelRef) -> None:
        """Write `model` as a Hugging Face directory, if this resolver does."""


class StageRunner:
    """The stages of one trajectory, their results given by a resolver.

    Args:
        on_iteration: called with what an iteration's model came to; may end the trajectory.
        overlap: evaluate in the background of what follows, one model at a time, and one more where
            nothing else is left to do.
    """

    def __init__(
        self,
        plan: TrajectoryPlan,
        resolver: Resolver,
        on_iteration: OnIteration | None = None,
        overlap: bool = False,
    ):
        self._plan = plan
        self._resolver = resolver
        self._on_iteration = on_iteration
        self._recovered: dict[str, float] = {}
        self._recovery_data: TextSpec | None = None
        self._teacher_states: ArtifactRef | None = None
        self._no_teacher_states = False
        self._background = ThreadPoolExecutor(1, "evaluation") if overlap else None
        self._failure: Exception | None = None
        self._evaluations: deque[tuple[Future[None], Callable[[], None]]] = deque()

    def score(self, iteration: IterationPlan, model: ModelRef) -> ScoreResult:
        """Score what may be removed from `model`; nothing is where nothing goes."""
        if not iteration.layers_to_drop:
            return NOTHING_TO_SCORE
        spec = self._plan.score_spec(model, iteration.layers_to_drop)
        return self._resolve(SCORE, spec, iteration, iteration.layers_left + iteration.layers_to_drop)

    def select(self, iteration: IterationPlan, model: ModelRef, scores: ScoreResult) -> Removal:
        """Choose what goes: the first of the removal order that the model's config can be without."""
        count = iteration.layers_to_drop
        if scores is NOT_SCORED:
            scored_by = stage_key("score", self._plan.key_inputs(self._plan.score_spec(model, count)))
            return Removal(placeholder=placeholder("pruned", [scored_by, count]))
        chosen = scores.removal_order[:count]
        if not self._plan.any_layers and not scores.merges:
            best = chosen
            chosen = tuple(models.choose_removable(model.source, model.dropped, scores.removal_order, count))
            if chosen != best:
                log.warning(
                    "%s iteration %d: the config of the model cannot be without layers %s, which score "
                    "best; layers %s go, the best that it can be without",
                    self._plan.id, iteration.index, list(best), list(chosen),
                )  # fmt: skip
        score_of = dict(zip(scores.source_layers, scores.scores, strict=True))
        return Removal(chosen, tuple(score_of[layer] for layer in chosen), scores.merges)

    def prune(self, iteration: IterationPlan, model: ModelRef, removal: Removal) -> ModelRef:
        """Return `model` without what `removal` names; nothing is computed, the choice is recorded."""
        pruned = removal.applied_to(model)
        self._resolver.prune(iteration, pruned, removal)
        return pruned

    def recover(self, iteration: IterationPlan, model: ModelRef) -> ModelRef:
        """Return `model` after what its recovery starts with, if anything, and then its objective."""
        if self._recovery_data is None:
            text, generation = self._plan.recovery_text, self._plan.generation_spec()
            if generation is not None:  # the unpruned model's responses, once for all iterations
                result = self._resolve(GENERATE, generation, iteration, self._plan.model.num_layers)
                text = generation.responses(result.artifact)
            self._recovery_data = text
        if self._plan.method.recovery.start is not None:
            model = self._recover(iteration, self._plan.start_spec(model, self._recovery_data), "start")
        spec = self._plan.recovery_spec(model, self._recovery_data)
        return self._recover(iteration, self._with_teacher_states(iteration, spec))

    def _with_teacher_states(self, iteration: IterationPlan, spec: RecoverySpec) -> RecoverySpec:
        """Return `spec` with what the teacher says of its data, stored once for all that train on them.

        A recovery that is finished needs nothing of it: it has the same key with and without. Where `auto`
        finds no room for it after all, the teacher runs in each recovery.
        """
        teach = self._plan.teach_spec()
        key = stage_key(RECOVER.name, self._plan.key_inputs(spec))
        if teach is None or self._no_teacher_states or self._resolver.holds(RECOVER, key):
            return spec
        if self._teacher_states is None:
            try:
                taught = self._resolve(TEACH, teach, iteration, self._plan.model.num_layers)
            except (TooLargeError, MemoryExhaustedError) as error:
                if self._plan.method.recovery.teacher_cache != "auto":
                    raise
                log.warning("%s: %s; the teacher runs in each recovery instead", self._plan.id, error)
                self._no_teacher_states = True
                return spec
            self._teacher_states = taught.artifact
        return replace(spec, teacher_states=self._teacher_states)

    def _recover(self, iteration: IterationPlan, spec: RecoverySpec, phase: str | None = None) -> ModelRef:
        result = self._resolve(RECOVER, spec, iteration, iteration.layers_left, phase)
        return spec.with_recovery(result.artifact)

    def evaluate(self, iteration: IterationPlan, model: ModelRef, phase: str) -> None:
        """Measure `model`, now or in the background; the numbers go to the ledger."""
        measure = partial(self._evaluate, iteration, model, phase)
        if self._background is None:
            measure()
        else:
            behind = partial(measure, background=True)
            self._evaluations.append((self._background.submit(self._unless_failed, behind), measure))

    def _unless_failed(self, measure: Callable[[], None]) -> None:
        """Measure, unless another evaluation has failed; its error, which ends the trajectory, is raised."""
        if self._failure is not None:
            raise self._failure
        try:
            measure()
        except MemoryExhaustedError:  # is tried once more
            raise
        except Exception as error:
            self._failure = error
            raise

    def _evaluate(
        self, iteration: IterationPlan, model: ModelRef, phase: str, background: bool = False
    ) -> None:
        def key(part: EvaluationSpec) -> str:
            return stage_key(EVALUATE.name, self._plan.key_inputs(part))

        parts = self._plan.evaluation_parts(model, lambda part: self._resolver.holds(EVALUATE, key(part)))
        beside = tuple(map(key, parts))
        metrics: list[Metric] = []
        for part in parts:
            result = self._resolve(
                EVALUATE, part, iteration, iteration.layers_left, phase, background, beside
            )
            metrics += result.metrics
            if part.log_samples and part.tasks and result.artifact is None:
                log.warning(
                    "%s iteration %d: its %s evaluation was finished before evaluation.log_samples and has "
                    "no samples; its numbers are used as they are",
                    self._plan.id, iteration.index, phase,
                )  # fmt: skip
        if phase == "recovered":
            self._recovered = {metric.name: metric.value for metric in metrics}

    def wait(self) -> None:
        """Return when all evaluations are finished; begin here, newest first, those that none has begun."""
        for at in reversed(range(len(self._evaluations))):
            waiting, measure = self._evaluations[at]
            if waiting.cancel():
                self._evaluations[at] = (_outcome(partial(self._unless_failed, measure)), measure)
        while self._evaluations:
            self._settle()

    def _settle(self) -> None:
        """Wait for the oldest evaluation; one that lacked memory is tried once more by itself.

        Any other failure is raised, and those that have not begun are not begun.
        """
        finished, measure = self._evaluations.popleft()
        try:
            finished.result()
        except MemoryExhaustedError as error:
            log.warning("%s: an evaluation in the background lacked memory: %s", self._plan.id, error)
            measure()
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Begin no evaluation in the background any more."""
        if self._background is not None:
            self._background.shutdown(wait=False, cancel_futures=True)

    def export(self, iteration: IterationPlan, model: ModelRef) -> None:
        """Write `model` as a Hugging Face directory, with its card and provenance."""
        self.wait()  # the card has what was measured
        self._resolver.export(iteration, model)

    def finish(self, iteration: IterationPlan) -> None:
        """Pass on what was measured of the iteration's model; the listener may end the trajectory here."""
        if self._on_iteration is not None and iteration.is_measured:
            self.wait()
            self._on_iteration(iteration.index, self._recovered)

    def _resolve(
        self,
        kind: StageKind[ResultT],
        spec: Any,
        iteration: IterationPlan,
        layers: int,
        phase: str | None = None,
        background: bool = False,
        beside: tuple[str, ...] = (),
    ) -> ResultT:
        inputs = self._plan.key_inputs(spec)
        # What failed in the background ends the trajectory before its next stage, not at its next export.
        while kind is not EVALUATE and self._evaluations and self._evaluations[0][0].done():
            self._settle()
        return self._resolver.resolve(
            StageRequest(
                kind, stage_key(kind.name, inputs), inputs, spec, iteration, layers, phase, background, beside
            )
        )


def _outcome(measure: Callable[[], None]) -> Future[None]:
    """Measure now; return how that ended."""
    ended: Future[None] = Future()
    try:
        measure()
    except Exception as error:
        ended.set_exception(error)
    else:
        ended.set_result(None)
    return ended


def placeholder(what: str, inputs: Any) -> ArtifactRef:
    """Return an artifact in the place of what a stage will decide; its hash follows from what decides."""
    return ArtifactRef("not-yet-known", (FileRef(what, 0, digest(inputs)),))
