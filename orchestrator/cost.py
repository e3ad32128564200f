"""What a campaign costs, before it runs."""

from dataclasses import asdict
from typing import Any

from orchestrator.plan import CampaignPlan, TrajectoryPlan, num_stages


def plan_summary(plan: CampaignPlan) -> list[dict[str, Any]]:
    """One JSON-able row a trajectory: what would run and how much arithmetic it is."""
    return [
        {
            "trajectory": t.id,
            "model": t.model.spec.path,
            "layers": t.model.num_layers,
            "targets": [i.layers_left for i in t.iterations if i.is_target],
            "iterations": len(t.iterations),
            "stages": num_stages(t),
            "recovery_tokens": t.recovery_tokens * len(t.iterations),
            "recovery_flops": recovery_flops(t),
            "recovery": {k: v for k, v in asdict(t.recovery_spec(t.dense)).items() if k == "objective"},
        }
        for t in plan.trajectories
    ]


def recovery_flops(trajectory: TrajectoryPlan) -> float:
    """Floating-point operations of all recoveries, by the usual count.

    2 a parameter and token for the teacher's forward pass, and 2 + 4 for the
    student's forward and backward pass, of which a frozen base saves a third.
    """
    info, total = trajectory.model, 0.0
    for iteration in trajectory.iterations:
        student = info.num_parameters * iteration.layers_left / info.num_layers
        total += trajectory.recovery_tokens * (2 * info.num_parameters + 4 * student)
    return total
