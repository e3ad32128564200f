"""Which recoveries read what the teacher said once instead of running it: `recovery.teacher_cache`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from actors.contracts import TeachSpec, TextSpec, digest
from actors.recovery import cache_obstacle
from orchestrator.config import CampaignConfig
from orchestrator.errors import RequestError
from orchestrator.planning.cost_model import (
    GB,
    LOAD_GB_PER_S,
    StageCost,
    block_flops,
    machine_at_work,
    seconds,
)
from orchestrator.planning.estimate import teach_cost
from orchestrator.planning.plan import TextSize, TrajectoryPlan
from orchestrator.planning.stages import PlannedStage
from orchestrator.scheduling.resources import devices_held, uses_gpus


@dataclass(frozen=True)
class Sharing:
    """Recoveries that would share one teaching: its request, their number, and their tokens in all."""

    spec: TeachSpec
    trajectories: tuple[TrajectoryPlan, ...]
    recoveries: int
    tokens: float


def with_teacher_caches(
    trajectories: Sequence[TrajectoryPlan], sizes: Mapping[TextSpec, TextSize], config: CampaignConfig
) -> tuple[tuple[TrajectoryPlan, ...], list[str]]:
    """Return the trajectories, each with what its recoveries read of the teacher, and notes for the plan.

    Raises:
        RequestError: a cache is asked for where the teacher has to run.
    """
    decided = {plan.id: replace(plan, teacher_cache=_possible(plan)) for plan in trajectories}
    undecided = [
        plan
        for plan in decided.values()
        if plan.teacher_cache != "off" and plan.method.recovery.teacher_cache == "auto"
    ]
    notes = []
    for sharing in shared_teachings(undecided):
        stored = taught_bytes(sharing, sizes)
        if stored <= (sharing.spec.max_gb or 0) * GB and saved_seconds(sharing, sizes, config) > 0:
            notes.append(
                f"the last hidden states of {sharing.spec.model.path!r} on the recovery data are stored "
                f"once for {sharing.recoveries} recoveries, about {stored / GB:.2g} GB "
                "(recovery.teacher_cache auto)"
            )
            continue
        for plan in sharing.trajectories:
            decided[plan.id] = replace(plan, teacher_cache="off")
    return tuple(decided[plan.id] for plan in trajectories), notes


def _possible(plan: TrajectoryPlan) -> Literal["off", "hidden", "topk"]:
    """Return the cache that the method asks for; for `auto`, `hidden` or, where that cannot be, `off`."""
    asked = plan.method.recovery.teacher_cache
    if asked == "off" or not any(map(plan.recovers, plan.iterations)):
        return "off"
    cache = "hidden" if asked == "auto" else asked
    if obstacle := cache_obstacle(plan.recovery_spec(plan.dense), cache):
        if asked == "auto":
            return "off"
        raise RequestError(
            f"method {plan.method.name!r}: recovery.teacher_cache {asked!r} cannot be, because {obstacle}"
        )
    return cache


def shared_teachings(plans: Sequence[TrajectoryPlan]) -> list[Sharing]:
    """Return the distinct teachings that the trajectories request, each with what shares it."""
    by_key: dict[str, list[TrajectoryPlan]] = {}
    for plan in plans:
        by_key.setdefault(digest(plan.key_inputs(plan.teach_spec())), []).append(plan)
    found = []
    for sharing in by_key.values():
        counts = [sum(map(plan.recovers, plan.iterations)) for plan in sharing]
        tokens = sum(count * float(plan.recovery_tokens) for count, plan in zip(counts, sharing, strict=True))
        spec = sharing[0].teach_spec()
        assert spec is not None
        found.append(Sharing(spec, tuple(sharing), sum(counts), tokens))
    return found


def taught_bytes(sharing: Sharing, sizes: Mapping[TextSpec, TextSize]) -> float:
    """Return roughly what the states take."""
    spec, info = sharing.spec, sharing.trajectories[0].model
    tokens = spec.max_tokens or sizes.get(spec.data, TextSize()).tokens
    return tokens * spec.bytes_per_token(info.hidden_size)


def saved_seconds(sharing: Sharing, sizes: Mapping[TextSpec, TextSize], config: CampaignConfig) -> float:
    """Return the time that recoveries save without the teacher, less that of storing and fetching its states.

    Reading them while training takes none: that is done ahead.
    """
    execution = config.execution
    machine = machine_at_work(config.cost, uses_gpus(execution))
    held, utilisation = devices_held(execution), config.cost.utilisation
    plan, spec = sharing.trajectories[0], sharing.spec
    stage = PlannedStage("teach", "", 0, plan.model.num_layers, spec, finished=False)
    cost = teach_cost(stage, plan, sizes)
    takes = seconds(cost, "teach", machine, held["teach"] or 1.0, spec.precision, utilisation)
    takes += taught_bytes(sharing, sizes) / (LOAD_GB_PER_S * GB)  # once a node, to fetch and verify them
    passes = plan.model.num_layers * block_flops(plan.model, sharing.tokens, spec.sequence_length)
    training = held["recover"] or 1.0
    # What is no stage of the table starts at once.
    return seconds(StageCost(passes), "", machine, training, spec.precision, utilisation) - takes
