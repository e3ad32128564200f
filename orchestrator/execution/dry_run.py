"""The stages of a trajectory, and which of them are the same: found before anything runs.

`run_trajectory` of `orchestrator.execution.trajectory` runs with a resolver that computes
nothing. Which layers a scoring will choose and what a recovery will leave is unknown,
so a placeholder takes their place in the model, named by the key of the stage that will decide.
Stages of two trajectories get the same key exactly if the same settings have led to them; they may
turn out to be the same more often than that (when two criteria choose the same layer), never less often.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.contracts import (
    EvaluationResult,
    ExportResult,
    GenerationResult,
    ModelRef,
    RecoveryResult,
    Removal,
    TeachResult,
)
from orchestrator.execution.stage_kinds import ResultT, StageKind, StageRequest
from orchestrator.execution.stage_runner import NOT_SCORED, StageRunner, placeholder
from orchestrator.execution.trajectory import run_trajectory
from orchestrator.export.former import find_former_export
from orchestrator.planning.keys import stage_key
from orchestrator.planning.plan import CampaignPlan, TrajectoryPlan
from orchestrator.planning.pruning_schedule import IterationPlan
from orchestrator.planning.stages import PlannedStage
from orchestrator.scheduling.limits import start_order
from orchestrator.storage.control import Directives
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import read_statuses


class PlaceholderResolver:
    """Records every stage with its key; takes from the store what is there, else a placeholder.

    Computes and changes nothing.
    """

    def __init__(self, plan: TrajectoryPlan, store: Store | None):
        self._plan = plan
        self._store = store
        self.found: list[PlannedStage] = []

    def resolve(self, stage: StageRequest[ResultT]) -> ResultT:
        """Return the stored result, or one with placeholders in it."""
        kind, key = stage.kind.name, stage.key
        result = self._store.peek(kind, key, stage.kind.result_type) if self._store else None
        self._note(kind, key, stage.iteration, stage.layers, stage.spec, result is not None)
        return PLACEHOLDERS[kind](key) if result is None else result

    def holds(self, kind: StageKind[Any], key: str) -> bool:
        """Return whether the store holds a stage."""
        return self._store is not None and self._store.peek(kind.name, key, kind.result_type) is not None

    def prune(self, iteration: IterationPlan, pruned: ModelRef, removal: Removal) -> None:
        """Record a choice, which is not computed: it is known as soon as the scores are."""
        key, known = stage_key("prune", self._plan.key_inputs(pruned)), removal.placeholder is None
        self._note("prune", key, iteration, iteration.layers_left, pruned, known)

    def export(self, iteration: IterationPlan, model: ModelRef) -> None:
        """Record an export. Its directory is of this trajectory alone, so it is never shared."""
        plan, store = self._plan, self._store
        inputs = plan.export_inputs(model, iteration)
        key = stage_key("export", inputs)
        uri = store.models_uri(plan.id, iteration.layers_left) if store is not None else ""
        done = store is not None and (
            store.peek("export", key, ExportResult) is not None
            or find_former_export(store, inputs, uri) is not None
        )
        self._note("export", key, iteration, iteration.layers_left, model, done)

    def _note(
        self, kind: str, key: str, iteration: IterationPlan, layers: int, spec: object, finished: bool
    ) -> None:
        self.found.append(PlannedStage(kind, key, iteration.index, layers, spec, finished))


PLACEHOLDERS: Mapping[str, Callable[[str], Any]] = {
    "score": lambda _key: NOT_SCORED,
    "generate": lambda key: GenerationResult(placeholder("generated", key), 0, 0, 0, 0),
    "teach": lambda key: TeachResult(placeholder("taught", key), 0, 0, 0),
    "recover": lambda key: RecoveryResult(placeholder("recovered", key), (), 0, 0),
    "evaluate": lambda _key: EvaluationResult((), 0),
}
"""The result of each kind of stage that is not finished, by the key of the stage."""


def planned_stages(plan: TrajectoryPlan, store: Store | None = None) -> list[PlannedStage]:
    """Return the stages of a trajectory, in order, each with the key that it will have, or a placeholder's.

    What `store` holds of them is taken from there, so that fewer placeholders are needed.
    """
    resolver = PlaceholderResolver(plan, store)
    run_trajectory(plan, StageRunner(plan, resolver))
    return resolver.found


def campaign_stages(plan: CampaignPlan, store: Store | None = None) -> dict[str, list[PlannedStage]]:
    """Return the stages of a campaign's trajectories, by the id of the trajectory."""
    return {trajectory.id: planned_stages(trajectory, store) for trajectory in plan.trajectories}


def unfinished_trajectories(
    plan: CampaignPlan, store: Store, asked: Directives | None = None, *, keep_ends: bool = False
) -> Mapping[str, Sequence[PlannedStage]]:
    """Return the trajectories to run with their stages, in the order in which they are to start.

    Args:
        asked: which are cancelled, and which have priority.
        keep_ends: leave out those that a scheduler gave up before, and those that are done with all their
            stages, so that both stay as they ended.
    """
    asked = asked or Directives()
    states = {name: status.state for name, status in read_statuses(store).items()} if keep_ends else {}
    given_up = {name for name, state in states.items() if state == "stopped"}
    given_up |= {*asked.cancelled}
    going = [trajectory for trajectory in plan.trajectories if trajectory.id not in given_up]
    planned = {trajectory.id: planned_stages(trajectory, store) for trajectory in going}
    left = {name: sum(not stage.finished for stage in stages) for name, stages in planned.items()}
    to_run = {name: count for name, count in left.items() if count or states.get(name) != "done"}
    order = start_order(to_run, asked.priorities)
    return {name: planned[name] for name in order}
