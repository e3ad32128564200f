"""The iteration loop: score, prune, recover, evaluate, until the deepest target (IteRABRe, Fig. 1)."""

from collections.abc import Sequence
from typing import Protocol

from actors.contracts import ModelRef
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.pruning_schedule import IterationPlan


class Stages(Protocol):
    """What a trajectory asks for; every call returns when the stage is finished, now or before.

    Only an evaluation may go on in the background: nothing that follows depends on its numbers.
    """

    def score(self, iteration: IterationPlan, model: ModelRef) -> Sequence[int]:
        """Source layers of `model`, from the first to remove to the last."""

    def prune(self, iteration: IterationPlan, model: ModelRef, source_layers: Sequence[int]) -> ModelRef:
        """`model` without those layers."""

    def recover(self, iteration: IterationPlan, model: ModelRef) -> ModelRef:
        """`model`, healed."""

    def evaluate(self, iteration: IterationPlan, model: ModelRef, phase: str) -> None:
        """Measure `model`; the numbers go to the ledger."""

    def wait(self) -> None:
        """Return when all evaluations are finished."""

    def export(self, iteration: IterationPlan, model: ModelRef) -> None:
        """Write `model` as a Hugging Face directory."""

    def finish(self, iteration: IterationPlan) -> None:
        """The iteration is over."""


def run_trajectory(plan: TrajectoryPlan, stages: Stages, until: int | None = None) -> ModelRef:
    """Take one model to the deepest target, or to the end of iteration `until`; return what it has become."""
    model = plan.dense
    stages.evaluate(IterationPlan(0, 0, plan.model.num_layers, False), model, "dense")

    for iteration in plan.iterations[:until]:
        removal_order = stages.score(iteration, model)
        pruned = stages.prune(iteration, model, removal_order[: iteration.layers_to_drop])
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
