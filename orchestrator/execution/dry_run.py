"""Which stages a campaign has, and which of them are the same: found before anything runs.

A trajectory is walked as `orchestrator.execution.trajectory` walks it, but with stages that
compute nothing. Which layers a scoring will choose and what a recovery will leave
is not known, so a stand-in takes their place in the model, named by the key of the
stage that will decide. Stages of two trajectories get the same key exactly if the
same settings have led to them; they may turn out to be the same more often than that
(when two criteria choose the same layer), never less often.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.contracts import (
    ArtifactRef,
    EvaluationResult,
    FileRef,
    GenerationResult,
    ModelRef,
    RecoveryResult,
    RecoverySpec,
    ScoreResult,
    TextSpec,
    digest,
)
from orchestrator.execution.stage_runner import removal_order
from orchestrator.execution.trajectory import run_trajectory
from orchestrator.planning.keys import stage_key
from orchestrator.planning.plan import CampaignPlan, TrajectoryPlan, stages_of_iteration, stages_once
from orchestrator.planning.pruning_schedule import EVERY_ITERATION, IterationPlan, iterative_schedule
from orchestrator.storage.stage_store import Store


@dataclass(frozen=True)
class PlannedStage:
    """A stage as a trajectory will ask for it; `layers` is the depth of the model it works on."""

    kind: str
    key: str
    iteration: int
    layers: int
    spec: Any
    finished: bool


@dataclass(frozen=True)
class StageCounts:
    """How often a campaign's stages are asked for.

    `cell_by_cell`: in a run of its own for every model, method, seed and target.
    `planned`: by the trajectories, each with its targets as stops.
    `distinct`: of those, the ones that differ; the others are shared.
    `finished`: of the distinct ones, those that the store holds.
    """

    cell_by_cell: int
    planned: int
    distinct: int
    finished: int

    @property
    def shared(self) -> int:
        return self.planned - self.distinct

    @property
    def to_run(self) -> int:
        return self.distinct - self.finished


def planned_stages(plan: TrajectoryPlan, store: Store | None = None) -> list[PlannedStage]:
    """The stages of a trajectory, in order, each with the key that it will have, or a stand-in's.

    What `store` holds of them is taken from there, so that the walk knows more.
    """
    stages = _Foreseen(plan, store)
    run_trajectory(plan, stages)
    return stages.found


def distinct_stages(stages: Iterable[PlannedStage]) -> dict[tuple[str, str], PlannedStage]:
    """Every stage once, by kind and key; the first that asks for it stands for all."""
    found: dict[tuple[str, str], PlannedStage] = {}
    for stage in stages:
        found.setdefault((stage.kind, stage.key), stage)
    return found


def count_stages(plan: CampaignPlan, store: Store | None = None) -> StageCounts:
    """The stages of a campaign, counted."""
    planned = [stage for trajectory in plan.trajectories for stage in planned_stages(trajectory, store)]
    distinct = distinct_stages(planned).values()
    return StageCounts(
        cell_by_cell=sum(_cell_by_cell(trajectory) for trajectory in plan.trajectories),
        planned=len(planned),
        distinct=len(distinct),
        finished=sum(stage.finished for stage in distinct),
    )


def remaining_stages(plan: TrajectoryPlan, store: Store) -> int:
    """Stages of a trajectory that `store` does not hold yet."""
    return sum(not stage.finished for stage in planned_stages(plan, store))


def _cell_by_cell(plan: TrajectoryPlan) -> int:
    """Stages of a run for each target alone: dense evaluation, its iterations, one export."""
    schedule, total = plan.method.schedule, 0
    for target in (iteration for iteration in plan.iterations if iteration.is_target):
        alone: tuple[IterationPlan, ...] = (target,)
        if schedule.mode != "direct":
            depths, measured = [target.layers_left], all(i.is_measured for i in plan.iterations)
            alone = iterative_schedule(
                plan.model.num_layers,
                depths,
                schedule.layers_per_iteration,
                schedule.recover_at,
                EVERY_ITERATION if measured else "targets",
            )
        total += stages_once(plan) + sum(stages_of_iteration(plan, iteration) for iteration in alone)
    return total


class _Foreseen:
    """Stages of `orchestrator.execution.trajectory` that note what will be asked for."""

    def __init__(self, plan: TrajectoryPlan, store: Store | None):
        self._plan = plan
        self._store = store
        self._scored: tuple[str, ScoreResult | None] = ("", None)
        self._generated: tuple[str, GenerationResult | None] | None = None
        self.found: list[PlannedStage] = []

    def score(self, iteration: IterationPlan, model: ModelRef) -> Sequence[int]:
        layers = iteration.layers_left + iteration.layers_to_drop
        spec = self._plan.score_spec(model, iteration.layers_to_drop)
        self._scored = self._note("score", iteration, layers, spec, ScoreResult)
        result = self._scored[1]
        return removal_order(self._plan, iteration, model, result) if result else ()

    def prune(self, iteration: IterationPlan, model: ModelRef, source_layers: Sequence[int]) -> ModelRef:
        key, scored = self._scored
        if scored:
            pruned = model.pruned(self._plan.granularity, tuple(source_layers)).merged(scored.merges)
        else:
            pruned = model.adapted(_stand_in("pruned", [key, iteration.layers_to_drop]))
        key = stage_key("prune", self._plan.key_inputs(pruned))
        # A choice that is recorded, not computed: known as soon as the scores are.
        stage = PlannedStage("prune", key, iteration.index, iteration.layers_left, pruned, bool(scored))
        self.found.append(stage)
        return pruned

    def recover(self, iteration: IterationPlan, model: ModelRef) -> ModelRef:
        data = self._recovery_data(iteration)
        if self._plan.method.recovery.start is not None:
            model = self._heal(iteration, self._plan.start_spec(model, data), trains=True)
        spec = self._plan.recovery_spec(model, data)
        return self._heal(iteration, spec, trains=self._plan.recovery_tokens > 0)

    def _recovery_data(self, iteration: IterationPlan) -> TextSpec:
        """The responses where they are there; else the prompts in their place."""
        spec = self._plan.generation_spec()
        if spec is None:
            return self._plan.recovery_text
        if not self._generated:
            layers = self._plan.model.num_layers
            self._generated = self._note("generate", iteration, layers, spec, GenerationResult)
        _, result = self._generated
        if result is None:
            return self._plan.recovery_text
        return spec.responses(result.artifact)

    def _heal(self, iteration: IterationPlan, spec: RecoverySpec, trains: bool) -> ModelRef:
        key, result = self._note("recover", iteration, iteration.layers_left, spec, RecoveryResult)
        if result:
            return spec.with_recovery(result.artifact)
        return spec.with_recovery(_stand_in("healed", key)) if trains else spec.model

    def evaluate(self, iteration: IterationPlan, model: ModelRef, phase: str) -> None:
        spec = self._plan.evaluation_spec(model)
        self._note("evaluate", iteration, iteration.layers_left, spec, EvaluationResult)

    def wait(self) -> None:
        """Nothing is under way."""

    def export(self, iteration: IterationPlan, model: ModelRef) -> None:
        # Its card and provenance tell of this trajectory alone, so an export is never shared.
        inputs = [self._plan.id, self._plan.key_inputs(model), iteration.layers_left]
        done = self._store is not None and self._store.has_export(
            self._plan.id, iteration.layers_left, self._plan.unit
        )
        stage = PlannedStage("export", digest(inputs), iteration.index, iteration.layers_left, model, done)
        self.found.append(stage)

    def finish(self, iteration: IterationPlan) -> None:
        """Nothing to note."""

    def _note(
        self, kind: str, iteration: IterationPlan, layers: int, spec: Any, result_type: type[Any]
    ) -> tuple[str, Any]:
        key = stage_key(kind, self._plan.key_inputs(spec))
        if kind == "recover" and self._generated and self._generated[1] is None:
            # Trained on responses that are not there yet: named by what will generate them.
            key = digest([key, self._generated[0]])
        result = self._store.peek(kind, key, result_type) if self._store else None
        self.found.append(PlannedStage(kind, key, iteration.index, layers, spec, result is not None))
        return key, result


def _stand_in(what: str, inputs: Any) -> ArtifactRef:
    """Takes the place of what a stage will decide; its hash follows from what decides."""
    return ArtifactRef("not-yet-known", (FileRef(what, 0, digest(inputs)),))
