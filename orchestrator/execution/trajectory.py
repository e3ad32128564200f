"""The iteration loop: score, prune, recover, evaluate, until the deepest target (IteRABRe, Fig. 1)."""

from typing import Protocol

from actors.contracts import ModelRef, Removal, ScoreResult
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.pruning_schedule import IterationPlan


class Stages(Protocol):
    """The stages of a trajectory; every call returns when the stage is finished, now or before.

    Only an evaluation may go on in the background: nothing that follows depends on its numbers.
    """

    def score(self, iteration: IterationPlan, model: ModelRef) -> ScoreResult:
        """Score what may be removed from `model`."""

    def select(self, iteration: IterationPlan, model: ModelRef, scores: ScoreResult) -> Removal:
        """Choose by its scores what goes from `model` in this iteration."""

    def prune(self, iteration: IterationPlan, model: ModelRef, removal: Removal) -> ModelRef:
        """Return `model` without what `removal` names."""

    def recover(self, iteration: IterationPlan, model: ModelRef) -> ModelRef:
        """Return `model`, recovered."""

    def evaluate(self, iteration: IterationPlan, model: ModelRef, phase: str) -> None:
        """Measure `model`; the numbers go to the ledger."""

    def wait(self) -> None:
        """Return when all evaluations are finished."""

    def export(self, iteration: IterationPlan, model: ModelRef) -> None:
        """Write `model` as a Hugging Face directory."""

    def finish(self, iteration: IterationPlan) -> None:
        """End the iteration."""


def run_trajectory(plan: TrajectoryPlan, stages: Stages, until: int | None = None) -> ModelRef:
    """Take one model to the deepest target, or to the end of iteration `until`; return what it has become."""
    model = plan.dense
    stages.evaluate(IterationPlan(0, 0, plan.model.num_layers, False), model, "dense")

    for iteration in plan.iterations[:until]:
        scores = stages.score(iteration, model)
        removal = stages.select(iteration, model, scores)
        pruned = stages.prune(iteration, model, removal)
        if iteration.is_measured and plan.also_before_recovery:
            stages.evaluate(iteration, pruned, "pruned")

        model = stages.recover(iteration, pruned) if plan.recovers(iteration) else pruned
        if iteration.is_measured:
            stages.evaluate(iteration, model, "recovered")
        if iteration.is_target:
            stages.export(iteration, model)
        stages.finish(iteration)

    stages.wait()
    return model
