"""The order in which a trajectory asks for its stages."""

from pathlib import Path

import pytest

from actors.contracts import ArtifactRef, FileRef, ModelRef, Removal, ScoreResult
from orchestrator.config import parse_config
from orchestrator.execution.dry_run import planned_stages
from orchestrator.execution.trajectory import run_trajectory
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.planner import build_plan
from orchestrator.planning.pruning_schedule import IterationPlan
from tests.support.tiny_campaign import tiny_campaign


class Recording:
    """Stages that note what they were asked for; the deepest remaining layer goes first."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, tuple[int, ...], int]] = []
        self.finished: list[int] = []

    def _note(self, stage: str, iteration: IterationPlan, model: ModelRef) -> None:
        self.asked.append((stage, iteration.index, model.dropped, len(model.adapters)))

    def score(self, iteration: IterationPlan, model: ModelRef) -> ScoreResult:
        self._note("score", iteration, model)
        layers = model.kept(4)
        return ScoreResult(layers, tuple(map(float, layers)), layers[::-1], 1, 1, 0)

    def select(self, iteration: IterationPlan, model: ModelRef, scores: ScoreResult) -> Removal:
        return Removal(scores.removal_order[: iteration.layers_to_drop])

    def prune(self, iteration: IterationPlan, model: ModelRef, removal: Removal) -> ModelRef:
        self._note("prune", iteration, model)
        return removal.applied_to(model)

    def recover(self, iteration: IterationPlan, model: ModelRef) -> ModelRef:
        self._note("recover", iteration, model)
        return model.adapted(ArtifactRef("here", (FileRef("a", 1, str(iteration.index)),)))

    def evaluate(self, iteration: IterationPlan, model: ModelRef, phase: str) -> None:
        self._note(f"evaluate {phase}", iteration, model)

    def wait(self) -> None:
        self.waited_after = len(self.asked)

    def export(self, iteration: IterationPlan, model: ModelRef) -> None:
        self._note("export", iteration, model)

    def finish(self, iteration: IterationPlan) -> None:
        self.finished.append(iteration.index)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trajectory")


def _plan(directory: Path, **changes: dict) -> TrajectoryPlan:
    campaign = tiny_campaign(directory) | changes
    return build_plan(parse_config(campaign, "campaign.yaml")).trajectories[0]


def test_stages_in_order_with_the_model_each_gets(directory: Path) -> None:
    stages = Recording()
    final = run_trajectory(_plan(directory, targets=[{"layers": 2}]), stages)
    assert stages.asked == [
        ("evaluate dense", 0, (), 0),
        ("score", 1, (), 0),
        ("prune", 1, (), 0),
        ("evaluate pruned", 1, (3,), 0),
        ("recover", 1, (3,), 0),
        ("evaluate recovered", 1, (3,), 1),
        ("score", 2, (3,), 1),
        ("prune", 2, (3,), 1),
        ("evaluate pruned", 2, (2, 3), 1),
        ("recover", 2, (2, 3), 1),
        ("evaluate recovered", 2, (2, 3), 2),
        ("export", 2, (2, 3), 2),
    ]
    assert stages.waited_after == len(stages.asked)
    assert (final.dropped, len(final.adapters)) == ((2, 3), 2)
    assert stages.finished == [1, 2]


def test_export_at_every_target_and_nowhere_else(directory: Path) -> None:
    stages = Recording()
    run_trajectory(_plan(directory, targets=[{"layers": 1}, {"layers": 3}]), stages)
    assert [at for stage, at, *_ in stages.asked if stage == "export"] == [1, 3]


def test_pruned_model_is_measured_only_if_asked(directory: Path) -> None:
    stages = Recording()
    evaluation = tiny_campaign(directory)["evaluation"] | {"also_before_recovery": False}
    run_trajectory(_plan(directory, evaluation=evaluation), stages)
    assert "evaluate pruned" not in [stage for stage, *_ in stages.asked]


def test_recovery_and_evaluation_at_targets_only_if_asked(directory: Path) -> None:
    """Algorithm 1 of *Limits*: scored again after every layer, recovered once."""
    campaign = tiny_campaign(directory)
    method = campaign["methods"][0] | {"schedule": {"recover_at": "targets"}}
    evaluation = campaign["evaluation"] | {"at": "targets"}
    stages = Recording()
    plan = _plan(directory, methods=[method], evaluation=evaluation, targets=[{"layers": 2}])
    run_trajectory(plan, stages)
    assert [stage for stage, *_ in stages.asked] == [
        "evaluate dense",
        *("score", "prune"),
        *("score", "prune", "evaluate pruned", "recover", "evaluate recovered", "export"),
    ]
    assert len(planned_stages(plan)) == len(stages.asked)


def test_until_ends_after_that_iteration(directory: Path) -> None:
    stages = Recording()
    model = run_trajectory(_plan(directory), stages, until=1)
    assert {at for _, at, *_ in stages.asked} == {0, 1}
    assert model.dropped == (3,)


def test_a_portion_of_several_layers(directory: Path) -> None:
    stages = Recording()
    method = tiny_campaign(directory)["methods"][0] | {"schedule": {"layers_per_iteration": 2}}
    model = run_trajectory(_plan(directory, methods=[method], targets=[{"layers": 1}]), stages)
    assert [dropped for stage, _, dropped, _ in stages.asked if stage == "recover"] == [(2, 3), (1, 2, 3)]
    assert model.dropped == (1, 2, 3)
