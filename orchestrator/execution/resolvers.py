"""Where results of stages come from: computed once and stored, or looked up in the store alone."""

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import datetime
from threading import Lock
from typing import Any

from actors.contracts import EvaluationResult, ExportSpec, ModelRef, Removal
from actors.stage_output import RunningStage, at_work_on
from orchestrator.errors import IterabreError, RequestError
from orchestrator.execution.progress import Report, StageProgress, TrajectoryProgress
from orchestrator.execution.stage_kinds import (
    EVALUATE,
    EXPORT,
    RECOVER,
    Backend,
    Numbers,
    ResultT,
    StageKind,
    StageRequest,
)
from orchestrator.execution.stage_runner import StageRunner
from orchestrator.execution.trajectory import run_trajectory
from orchestrator.planning.keys import stage_key
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.pruning_schedule import IterationPlan
from orchestrator.scheduling.leases import Leases
from orchestrator.scheduling.resources import resource_kind
from orchestrator.storage.layout import stage_log
from orchestrator.storage.ledger import Ledger, Row
from orchestrator.storage.stage_manifest import StoredStage
from orchestrator.storage.stage_store import Store
from orchestrator.storage.superseded import move_superseded, superseded_parts

log = logging.getLogger(__name__)


class ComputeResolver:
    """Finds each stage in the store or computes it, once for all trajectories that need it.

    Its numbers go to the ledger either way, under a name that makes writing them twice harmless.

    Args:
        leases: keep other trajectories from computing the same stage meanwhile.
        stages_total: stages that the trajectory will have passed at its end.
    """

    def __init__(
        self,
        plan: TrajectoryPlan,
        store: Store,
        backend: Backend,
        report: Report,
        leases: Leases,
        stages_total: int,
    ):
        self._plan = plan
        self._store = store
        self._backend = backend
        self._report = report
        self._leases = leases
        self._ledger = Ledger(store.ledger_uri)
        self._former_parts = self._ledger.parts(f"{plan.id}-")
        self._counting = Lock()
        self._measured_to = 0
        self.progress = TrajectoryProgress(
            plan.id, 0, len(plan.iterations), "starting", stages_total=stages_total
        )

    def resolve(self, stage: StageRequest[ResultT]) -> ResultT:
        """Return the result of a stage from the store, or computed now; write its numbers to the ledger."""
        kind = stage.kind.name
        with self._counting:
            now = replace(
                self.progress,
                iteration=stage.iteration.index,
                stage=kind,
                key=stage.key,
                background=stage.background,
                phase=stage.phase or "",
            )
            if not stage.background:  # the progress shows what the trajectory waits for
                self.progress = now
        progress = StageProgress(self._report, now, self._leases.stopping)
        stored = self._store.load(kind, stage.key, stage.kind.result_type)
        reused = stored is not None
        if stored is None:
            with at_work_on(self._running(stage)):
                stored, reused = self._compute(stage, progress)
        if stage.background:
            self._report(replace(now, finished=True))
        if isinstance(stored.result, EvaluationResult) and stage.phase != "pruned":
            self._note_measured(stored.result, stage)
        self._count(kind, reused, stored.seconds, background=stage.background)
        numbers = [*stage.kind.numbers(stored.result), ("seconds", stored.seconds, "s", {})]
        if stored.waited_s:
            numbers.append(("waited_s", stored.waited_s, "s", {}))
        where = {"when": datetime.fromisoformat(stored.created_at), "where": stored.host}
        self._record(stage.iteration, kind, stage.key, numbers, stage.phase, where, stage.beside)
        return stored.result

    def _note_measured(self, result: EvaluationResult, stage: StageRequest[Any]) -> None:
        """Note of the newest model what the progress shows: its perplexities, and one number."""
        ending = "/token_perplexity"
        found = {m.name.removesuffix(ending): m.value for m in result.metrics if m.name.endswith(ending)}
        first = sorted(result.metrics, key=lambda metric: not metric.name.endswith(ending))[:1]
        whose = "unpruned " if stage.phase == "dense" else ""
        measured = {whose + metric.name: metric.value for metric in first}
        with self._counting:
            if stage.iteration.index < self._measured_to:  # that of a newer model was ready before it
                return
            self._measured_to = stage.iteration.index
            self.progress = replace(self.progress, perplexities=found, measured=measured)

    def _running(self, stage: StageRequest[ResultT]) -> RunningStage:
        iteration, kind = stage.iteration.index, stage.kind.name
        phase = f" ({stage.phase})" if stage.phase else ""
        return RunningStage(
            f"{kind}{phase} {self._plan.id} iteration {iteration}",
            stage_log(self._plan.id, iteration, kind, stage.key),
        )

    def _compute(
        self, stage: StageRequest[ResultT], progress: StageProgress
    ) -> tuple[StoredStage[ResultT], bool]:
        """Return the stage, computed here or by another trajectory while this one waited, and whether so."""
        kind, key = stage.kind.name, stage.key
        stages_left = self.progress.stages_total - self.progress.stages_done
        self._leases.acquire(resource_kind(kind, stage.spec), key, stages_left, progress.waits_for)
        failed, seconds, at = True, 0.0, (self._plan.id, stage.iteration.index, kind, key[:12])
        try:
            if stored := self._store.load(kind, key, stage.kind.result_type):
                failed = False
                return stored, True
            log.info("%s iteration %d: %s %s starts", *at)
            uri = self._store.payload_uri(kind, key, time.time_ns())
            if stage.kind is EXPORT:
                uri = self._store.models_uri(self._plan.id, stage.layers)
            started = time.monotonic()
            try:
                result = stage.kind.compute(self._backend, stage, progress, uri)
            except Exception as error:
                expected = isinstance(error, IterabreError)
                log.error("%s iteration %d: %s %s failed: %s", *at, error, exc_info=not expected)
                with self._counting:  # the log that a failure names is that of its stage
                    iteration = stage.iteration.index
                    self.progress = replace(self.progress, iteration=iteration, stage=kind, key=key)
                raise
            finally:
                # What waits for room on the cluster computes nothing, and is not paid for.
                seconds = max(0.0, time.monotonic() - started - progress.waited_s)
            # Responses, an adapter, an exported directory; some stages only measure.
            artifact = getattr(result, "artifact", None)
            stored = self._store.commit(kind, key, result, stage.inputs, artifact, seconds, progress.waited_s)
            if stage.kind in (RECOVER, EVALUATE):
                self._store.drop_unfinished(kind, key)
            failed = False
        finally:
            self._leases.release(key, seconds, failed)
        log.info("%s iteration %d: %s %s took %.1f s", *at, seconds)
        return stored, False

    def holds(self, kind: StageKind[Any], key: str) -> bool:
        """Return whether the store holds a stage."""
        return self._store.peek(kind.name, key, kind.result_type) is not None

    def prune(self, iteration: IterationPlan, pruned: ModelRef, removal: Removal) -> None:
        """Record what was removed."""
        scored = zip(removal.source_layers, removal.scores, strict=True)
        numbers: Numbers = [
            *(("dropped", score, "", {"layer": layer}) for layer, score in scored),
            ("layers", iteration.layers_left, "", {}),
        ]
        self._record(iteration, "prune", stage_key("prune", self._plan.key_inputs(pruned)), numbers)
        if not self._plan.recovers(iteration):
            for phase in ("start", "all"):
                self._replace((iteration.index, "recover", phase), ())
        self._count("prune", reused=False)

    def export(self, iteration: IterationPlan, model: ModelRef) -> None:
        """Write `model` as a Hugging Face directory; then, beside it, its card and provenance."""
        from orchestrator.export.description import describe_export
        from orchestrator.export.former import adopt_former_export

        plan, layers = self._plan, iteration.layers_left
        uri = self._store.models_uri(plan.id, layers)
        inputs = plan.export_inputs(model, iteration)
        key = stage_key(EXPORT.name, inputs)
        adopt_former_export(self._store, key, inputs, uri)
        result = self.resolve(StageRequest(EXPORT, key, inputs, ExportSpec(model), iteration, layers))
        rows = self._ledger.read(f"{plan.id}-").to_pylist()
        describe_export(uri, plan, iteration, model, rows, result)

    def _count(self, kind: str, reused: bool, seconds: float = 0.0, background: bool = False) -> None:
        """Count a finished stage; unless it ran in the background, the trajectory is at no stage then."""
        with self._counting:
            now = self.progress
            if not background:
                now = replace(now, stage="", key="", phase="")
            self.progress = replace(
                now,
                stages_done=now.stages_done + 1,
                stages_reused=now.stages_reused + reused,
                kinds_done={**now.kinds_done, kind: now.kinds_done.get(kind, 0) + 1},
                seconds_of={**now.seconds_of, kind: now.seconds_of.get(kind, 0.0) + seconds},
            )
        self._report(self.progress)

    def _record(
        self,
        iteration: IterationPlan,
        kind: str,
        key: str,
        numbers: Numbers,
        phase: str | None = None,
        where: Mapping[str, Any] | None = None,
        beside: tuple[str, ...] = (),
    ) -> None:
        """Write a stage's numbers to the ledger, once; what it takes the place of is moved away."""
        self._replace((iteration.index, kind, phase or "all"), (key, *beside))
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
            **(where or {}),
        }
        rows = [Row(**common, metric=m, value=float(v), unit=u, **more) for m, v, u, more in numbers]
        self._ledger.append(part, rows)

    def _replace(self, slot: tuple[int, str, str], keys: Collection[str]) -> None:
        """Move what stages with other keys have recorded in this place, and what followed from it."""
        with self._counting:
            replaced = superseded_parts(self._former_parts, self._plan.id, slot, keys)
            move_superseded(self._store, replaced)
            self._former_parts = [name for name in self._former_parts if name not in replaced]


class LookUpResolver:
    """Takes from the store alone the stages that make a model what it is.

    Those that measure or copy it need not be there; nothing is computed or recorded.
    """

    def __init__(self, store: Store):
        self._store = store

    def resolve(self, stage: StageRequest[ResultT]) -> ResultT:
        """Return the stored result of a stage.

        Raises:
            RequestError: it is not finished.
        """
        if stage.kind is EVALUATE:
            return EvaluationResult((), 0)  # type: ignore[return-value]
        stored = self._store.load(stage.kind.name, stage.key, stage.kind.result_type)
        if stored is None:
            raise RequestError(
                f"that iteration's {stage.kind.name} stage is not finished; continue the run with "
                "--resume first"
            )
        return stored.result

    def holds(self, kind: StageKind[Any], key: str) -> bool:
        """Return true: evaluations are passed over."""
        return True

    def prune(self, iteration: IterationPlan, pruned: ModelRef, removal: Removal) -> None:
        """Pass over the record of a choice."""

    def export(self, iteration: IterationPlan, model: ModelRef) -> None:
        """Pass over an export."""


def finished_model(plan: TrajectoryPlan, store: Store, iteration: int) -> ModelRef:
    """Return the recovered model of a finished iteration, looked up along its trajectory.

    Raises:
        RequestError: no such iteration, or it is not finished.
    """
    if not 1 <= iteration <= len(plan.iterations):
        raise RequestError(f"{plan.id} has iterations 1 to {len(plan.iterations)}, not {iteration}")
    return run_trajectory(plan, StageRunner(plan, LookUpResolver(store)), until=iteration)
