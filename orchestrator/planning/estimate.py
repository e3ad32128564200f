"""The estimate that `iterabre plan` shows: stages, arithmetic, memory, hours and price of a campaign."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from actors.contracts import (
    CLOSED_FORM_OBJECTIVES,
    DTYPE_BYTES,
    EvaluationSpec,
    GenerationSpec,
    RecoverySpec,
    ScoreSpec,
    TeachSpec,
    TextSpec,
)
from actors.recovery import find_objective
from actors.scoring import TaskCriterion, find_criterion
from orchestrator.config import CampaignConfig
from orchestrator.config.execution import ExecutionConfig
from orchestrator.planning.cost_model import (
    CURRENCY,
    GB,
    TASK_LENGTH,
    Machine,
    StageCost,
    block_flops,
    calibration,
    head_flops,
    kept_parameters,
    machine_at_work,
    seconds,
    task_tokens,
    training_block_flops,
)
from orchestrator.planning.plan import CampaignPlan, TextSize, TrajectoryPlan
from orchestrator.planning.stages import PlannedStage, count_stages, distinct_stages
from orchestrator.planning.training_memory import training_memory
from orchestrator.scheduling.resources import devices_held, resource_kind, stage_resources, uses_gpus
from orchestrator.storage.ledger import measured_seconds

AUTO_BATCH = 8
"""Sequences of a batch where the batch follows from the memory that there is."""

WITHOUT_TEACHER = frozenset({"healing", "sft", "sgr"})
"""Objectives that never run the unpruned model while they train."""


@dataclass(frozen=True)
class Costed:
    """A distinct stage of a campaign with what it costs, and the trajectory that requests it first."""

    stage: PlannedStage
    trajectory: TrajectoryPlan
    cost: StageCost

    def devices(self, held: Mapping[str, float]) -> float:
        """Return the devices of the stage, from those that each kind holds."""
        return held.get(resource_kind(self.stage.kind, self.stage.spec), 0.0)

    def memory_bytes_a_device(self, execution: ExecutionConfig) -> float:
        """Return the memory of each GPU of an actor, over which a model's blocks are placed."""
        request = stage_resources(execution).get(resource_kind(self.stage.kind, self.stage.spec))
        gpus = 1.0 if request is None or self.stage.kind == "recover" else request.bundle.gpus
        return self.cost.memory_bytes / max(1.0, gpus)


Planned = Mapping[str, Sequence[PlannedStage]]
"""The stages of each trajectory, by its id, as a dry run found them."""


def costed_stages(plan: CampaignPlan, planned: Planned, workers: int = 1) -> list[Costed]:
    """Return every distinct stage of the planned trajectories, in the order in which it is first requested.

    Args:
        workers: that share a recovery.
    """
    first: dict[tuple[str, str], tuple[PlannedStage, TrajectoryPlan]] = {}
    for trajectory in (each for each in plan.trajectories if each.id in planned):
        for name, stage in distinct_stages(planned[trajectory.id]).items():
            first.setdefault(name, (stage, trajectory))
    return [Costed(s, t, stage_cost(s, t, plan.text_sizes, workers)) for s, t in first.values()]


def stage_cost(
    stage: PlannedStage, trajectory: TrajectoryPlan, sizes: Mapping[TextSpec, TextSize], workers: int = 1
) -> StageCost:
    """Return what one stage costs; nothing for those that only record."""
    if stage.kind == "recover":
        return recover_cost(stage, trajectory, sizes, workers)
    model = COSTS.get(stage.kind)
    return model(stage, trajectory, sizes) if model else StageCost()


def score_cost(
    stage: PlannedStage, trajectory: TrajectoryPlan, sizes: Mapping[TextSpec, TextSize]
) -> StageCost:
    spec: ScoreSpec = stage.spec
    info, criterion = trajectory.model, find_criterion(spec.criterion)
    each, layers = DTYPE_BYTES[info.spec.dtype], stage.layers
    weights = kept_parameters(info, layers) * each
    if isinstance(criterion, TaskCriterion) and spec.task:
        read = layers * task_tokens([spec.task.name], spec.task.limit)
        flops = (layers - 1) * block_flops(info, read, TASK_LENGTH) + head_flops(info, read)
        return StageCost(flops, layers * weights, weights)
    if not criterion.uses_sequences:
        return StageCost(0.0, weights, weights)
    size = sizes.get(spec.calibration, TextSize())
    rows, tokens = size.rows, size.tokens
    sequences = min(rows, spec.max_sequences or rows)
    length = min(spec.sequence_length, tokens / rows)
    flops = criterion.forwards(sequences, layers) * block_flops(info, length, length)
    pruned = layers < info.num_layers and spec.reference == "source"
    if pruned:
        flops += info.num_layers * block_flops(info, sequences * length, length)
    loaded = weights + (info.num_parameters * each if pruned else 0)
    held = loaded / layers if spec.stream_weights else loaded
    hidden = layers * length * info.hidden_size * each
    if spec.memory_budget_gb:
        hidden = spec.memory_budget_gb * 2**30
    return StageCost(flops, loaded, held + hidden)


def recover_cost(
    stage: PlannedStage, trajectory: TrajectoryPlan, sizes: Mapping[TextSpec, TextSize], workers: int = 1
) -> StageCost:
    spec: RecoverySpec = stage.spec
    info, layers, tokens = trajectory.model, stage.layers, float(spec.max_tokens)
    if spec.epochs is not None:
        tokens = min(tokens, spec.epochs * sizes.get(spec.data, TextSize()).tokens)
    if not find_objective(spec.objective).applies_recovery:
        return StageCost()
    each, length = DTYPE_BYTES[info.spec.dtype], spec.sequence_length
    if spec.objective in CLOSED_FORM_OBJECTIVES:
        flops = (info.num_layers + layers) * block_flops(info, tokens, length)
        memory = training_memory(spec, info, layers, workers, True)
        return StageCost(flops, info.num_parameters * each, memory)
    rank = None if spec.adapter.kind == "full" else spec.adapter.rank
    # Blocks below the first trained one run forward only, once for teacher and student.
    first = min(spec.first_trainable, layers)
    flops = (layers - first) * training_block_flops(info, tokens, length, rank)
    flops += first * block_flops(info, tokens, length)
    if spec.gradient_checkpointing is True:
        flops += (layers - first) * block_flops(info, tokens, length)
    taught = spec.objective not in WITHOUT_TEACHER
    runs_teacher = taught and spec.teacher_states is None
    if runs_teacher:
        shared = 0 if spec.adapter.leaves_weights or spec.teacher else first
        flops += (info.num_layers - shared) * block_flops(info, tokens, length)
    if not taught or spec.loss.logit_loss != "mse":
        # Otherwise the head is never run: its error comes from the hidden states.
        flops += (2 + taught) * head_flops(info, tokens)
    memory = training_memory(spec, info, layers, workers, runs_teacher)
    return StageCost(flops, info.num_parameters * each, memory)


def evaluate_cost(
    stage: PlannedStage, trajectory: TrajectoryPlan, sizes: Mapping[TextSpec, TextSize]
) -> StageCost:
    spec: EvaluationSpec = stage.spec
    info, layers, each = trajectory.model, stage.layers, DTYPE_BYTES[trajectory.model.spec.dtype]
    flops, longest = 0.0, 0
    for text in spec.perplexity:
        tokens = sizes.get(text.data, TextSize()).tokens
        tokens = min(tokens, text.max_tokens or tokens)
        flops += layers * block_flops(info, tokens, text.context) + head_flops(info, tokens)
        longest = max(longest, text.context)
    if spec.tasks:
        read = task_tokens(spec.tasks, spec.limit)
        flops += layers * block_flops(info, read, TASK_LENGTH) + head_flops(info, read)
        longest = max(longest, TASK_LENGTH * (spec.batch_size or AUTO_BATCH))
    weights = kept_parameters(info, layers) * each
    return StageCost(flops, weights, weights + longest * info.vocab_size * 4)


def generate_cost(
    stage: PlannedStage, trajectory: TrajectoryPlan, sizes: Mapping[TextSpec, TextSize]
) -> StageCost:
    """Return the cost of prefilling each prompt for each of its responses, and of each generated token.

    Every response is counted at its longest, and a token as one forward pass over itself.
    """
    spec: GenerationSpec = stage.spec
    info, layers, each = trajectory.model, stage.layers, DTYPE_BYTES[trajectory.model.spec.dtype]
    size = sizes.get(spec.prompts, TextSize())
    rows = size.rows
    prompt_tokens, responses = (
        size.tokens / rows,
        min(rows, spec.max_prompts or rows) * spec.responses_per_prompt,
    )
    length = prompt_tokens + spec.max_new_tokens
    flops = layers * block_flops(info, responses * prompt_tokens, prompt_tokens)
    # A new token attends to all before it: half of the longest sequence, on average, beside the prompt.
    generated = float(responses * spec.max_new_tokens)
    flops += layers * block_flops(info, generated, prompt_tokens + spec.max_new_tokens / 2)
    flops += head_flops(info, responses + generated)
    weights = info.num_parameters * each
    cache = 2 * layers * spec.batch_size * length * info.attention_width * each
    return StageCost(flops, weights, weights + cache)


def teach_cost(
    stage: PlannedStage, trajectory: TrajectoryPlan, sizes: Mapping[TextSpec, TextSize]
) -> StageCost:
    """Return the cost of one pass over the data, and of writing its states as fast as weights are read."""
    spec: TeachSpec = stage.spec
    info, each = trajectory.model, DTYPE_BYTES[spec.precision]
    tokens = float(spec.max_tokens or sizes.get(spec.data, TextSize()).tokens)
    flops = info.num_layers * block_flops(info, tokens, spec.sequence_length)
    if spec.top_k is not None:
        flops += head_flops(info, tokens)
    weights = info.num_parameters * each
    stored = tokens * spec.bytes_per_token(info.hidden_size)
    hidden = 2 * spec.batch_size * spec.sequence_length * info.hidden_size * each
    return StageCost(flops, weights + stored, weights + hidden)


def export_cost(
    stage: PlannedStage, trajectory: TrajectoryPlan, _sizes: Mapping[TextSpec, TextSize]
) -> StageCost:
    weights = kept_parameters(trajectory.model, stage.layers) * DTYPE_BYTES[trajectory.model.spec.dtype]
    return StageCost(0.0, 2 * weights, weights)


COSTS: dict[str, Callable[[PlannedStage, TrajectoryPlan, Mapping[TextSpec, TextSize]], StageCost]] = {
    "score": score_cost,
    "generate": generate_cost,
    "teach": teach_cost,
    "recover": recover_cost,
    "evaluate": evaluate_cost,
    "export": export_cost,
}
"""The cost model of each kind of stage; a prune only records."""


def stage_seconds(
    costed: Costed,
    config: CampaignConfig,
    machine: Machine,
    factors: Mapping[str, float],
    devices: Mapping[str, float],
) -> float:
    """Return how long a stage takes on that machine; nothing if it only records."""
    kind = costed.stage.kind
    if kind not in COSTS or costed.cost == StageCost():
        return 0.0
    # What holds no GPU where others do is counted as fast as one, for want of a better estimate.
    held, dtype = costed.devices(devices) or 1.0, costed.trajectory.model.spec.dtype
    expected = seconds(costed.cost, kind, machine, held, dtype, config.cost.utilisation)
    return expected * factors.get(kind, 1.0)


def expected_seconds(
    config: CampaignConfig, plan: CampaignPlan, planned: Planned
) -> dict[tuple[str, str], float]:
    """Return what the cost model expects of each distinct stage: on a CPU core where no stage has a GPU."""
    stages = costed_stages(plan, planned, config.execution.training.workers)
    machine = machine_at_work(config.cost, uses_gpus(config.execution))
    devices = devices_held(config.execution)
    return {
        (each.stage.kind, each.stage.key): stage_seconds(each, config, machine, {}, devices)
        for each in stages
    }


@dataclass(frozen=True)
class MachineEstimate:
    """A campaign on `count` devices of one type.

    `hours` is the least time from start to end: all devices always busy, or the
    longest trajectory, whichever is more. `fits` says whether the memory is enough.
    """

    machine: Machine
    count: int
    fits: bool
    device_hours: float
    hours: float
    price: float


def estimate(
    config: CampaignConfig,
    stages: list[Costed],
    count: int,
    machine: Machine,
    factors: Mapping[str, float] | None = None,
) -> MachineEstimate:
    """Return time and price of the stages that are not finished, on `count` devices."""
    devices = devices_held(config.execution)
    todo = [costed for costed in stages if not costed.stage.finished]
    device_seconds, longest = 0.0, dict.fromkeys((costed.trajectory.id for costed in todo), 0.0)
    for costed in todo:
        time_s = stage_seconds(costed, config, machine, factors or {}, devices)
        device_seconds += time_s * costed.devices(devices)
        longest[costed.trajectory.id] += time_s
    device_hours = device_seconds / 3600
    hours = max(device_hours / count, max(longest.values(), default=0.0) / 3600)
    memory = max((costed.memory_bytes_a_device(config.execution) for costed in stages), default=0.0)
    widest = max((costed.devices(devices) for costed in stages), default=0.0)
    fits = memory <= machine.memory_gb * GB and count >= widest
    return MachineEstimate(machine, count, fits, device_hours, hours, device_hours * machine.price_per_hour)


def plan_summary(
    plan: CampaignPlan,
    config: CampaignConfig,
    machines: list[tuple[int, Machine]],
    planned: Planned,
    factors: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return what `iterabre plan` shows, as JSON values: trajectories, stages, costs, machines."""
    stages = costed_stages(plan, planned, config.execution.training.workers)
    counts = count_stages(stage for t in plan.trajectories for stage in planned[t.id])
    kinds = [kind for kind in COSTS if any(costed.stage.kind == kind for costed in stages)]
    return {
        "trajectories": [
            {
                "trajectory": t.id,
                "model": t.model.spec.path,
                "layers": t.model.num_layers,
                "targets": [i.layers_left for i in t.iterations if i.is_target],
                "iterations": len(t.iterations),
                "stages": len(planned[t.id]),
                "recovery_tokens": sum(
                    stage.spec.max_tokens for stage in planned[t.id] if stage.kind == "recover"
                ),
                "recovery_flops": sum(
                    stage_cost(stage, t, plan.text_sizes).flops
                    for stage in planned[t.id]
                    if stage.kind == "recover"
                ),
                "objective": t.method.recovery.objective,
            }
            for t in plan.trajectories
        ],
        "stages": asdict(counts) | {"shared": counts.shared, "to_run": counts.to_run},
        "kinds": [
            {
                "kind": kind,
                "stages": sum(c.stage.kind == kind for c in stages),
                "to_run": sum(c.stage.kind == kind and not c.stage.finished for c in stages),
                "flops": sum(c.cost.flops for c in stages if c.stage.kind == kind and not c.stage.finished),
                "memory_bytes": max(
                    c.memory_bytes_a_device(config.execution) for c in stages if c.stage.kind == kind
                ),
            }
            for kind in kinds
        ],
        "methods": [
            _of_method(
                name, config, [c for c in stages if c.trajectory.method.name == name], machines, factors
            )
            for name in dict.fromkeys(t.method.name for t in plan.trajectories)
        ],
        "calibration": dict(factors or {}),
        "currency": CURRENCY,
        "machines": [asdict(estimate(config, stages, n, machine, factors)) for n, machine in machines],
    }


def _of_method(
    name: str,
    config: CampaignConfig,
    stages: list[Costed],
    machines: list[tuple[int, Machine]],
    factors: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Return what the stages of one method cost on each type of machine; shared ones are of the first."""
    types = {machine.name: machine for _, machine in machines}
    todo = [costed for costed in stages if not costed.stage.finished]
    return {
        "method": name,
        "to_run": len(todo),
        "flops": sum(costed.cost.flops for costed in todo),
        "machines": [
            {"machine": kind, "device_hours": each.device_hours, "price": each.price}
            for kind, machine in types.items()
            for each in (estimate(config, stages, 1, machine, factors),)
        ],
    }


def calibrate(
    config: CampaignConfig, plan: CampaignPlan, planned: Planned, ledger: pa.Table, machine: Machine
) -> dict[str, float]:
    """Return how much longer the stages of an earlier run took than the model says, by kind.

    `planned` says which of them that run has finished, on `machine`.
    """
    devices = devices_held(config.execution)
    predicted = {
        (costed.stage.kind, costed.stage.key): stage_seconds(costed, config, machine, {}, devices)
        for costed in costed_stages(plan, planned)
        if costed.stage.finished
    }
    return calibration(measured_seconds(ledger), predicted)
