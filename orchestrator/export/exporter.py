"""Writing the model of any finished iteration of a run."""

from pathlib import Path
from typing import Any

from actors.contracts import ExportResult, ExportSpec, ModelRef
from actors.models import export_model
from orchestrator.errors import RequestError, unknown_name
from orchestrator.execution.stage_runner import StoredStages
from orchestrator.execution.trajectory import run_trajectory
from orchestrator.export.model_card import model_card, provenance
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.planner import build_plan
from orchestrator.planning.pruning_schedule import IterationPlan
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.run_manifest import recorded_config
from orchestrator.storage.stage_store import Store


class _FinishedOnly:
    """A backend for looking up: whatever is not in the store is not finished."""

    def __getattr__(self, stage: str) -> Any:
        raise RequestError(
            f"that iteration's {stage} stage is not finished; continue the run with --resume first"
        )


class _NobodyElse:
    """Claims of a walk that only looks up."""

    def take(self, kind: str, key: str, stages_left: int) -> None:
        """Granted."""

    def give_back(self, key: str, seconds: float) -> None:
        """Nobody waits for it."""


class _Lookup(StoredStages):
    """The stages that make the model what it is; those that measure or copy it need not be there."""

    def evaluate(self, iteration: IterationPlan, model: ModelRef, phase: str) -> None:
        """Passed over."""

    def export(self, iteration: IterationPlan, model: ModelRef) -> None:
        """Passed over."""


def export_iteration(run: str, trajectory_id: str, iteration: int, directory: Path) -> ExportResult:
    """Write the recovered model of an iteration to `directory`.

    Raises:
        RequestError: no such trajectory or iteration, or it is not finished.
    """
    store = Store(run)
    plan = _trajectory(store, trajectory_id)
    model = model_at(plan, store, iteration)
    round_ = plan.iterations[iteration - 1]
    rows = Ledger(store.ledger_uri).read().to_pylist()
    spec = ExportSpec(model, model_card(plan, round_, model, rows), provenance(plan, round_, model, rows))
    return export_model(spec, str(directory.resolve()))


def model_at(plan: TrajectoryPlan, store: Store, iteration: int) -> ModelRef:
    """The recovered model of a finished iteration, found by walking its trajectory through the store."""
    if not 1 <= iteration <= len(plan.iterations):
        raise RequestError(f"{plan.id} has iterations 1 to {len(plan.iterations)}, not {iteration}")
    stages = _Lookup(plan, store, _FinishedOnly(), lambda _activity: None, _NobodyElse())
    return run_trajectory(plan, stages, until=iteration)


def _trajectory(store: Store, trajectory_id: str) -> TrajectoryPlan:
    config = recorded_config(store)
    if config is None:
        raise RequestError(f"{store.uri!r} holds no run: there is no campaign.json in it")
    plan = build_plan(config)
    known = [trajectory.id for trajectory in plan.trajectories]
    if trajectory_id not in known:
        raise unknown_name("trajectory", trajectory_id, known)
    return plan.find(trajectory_id)
