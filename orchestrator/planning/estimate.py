"""The estimate that `iterabre plan` shows: stages, arithmetic, memory, hours and price of a campaign."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from actors.contracts import EvaluationSpec, RecoverySpec, ScoreSpec, TextSpec
from actors.recovery import find_objective
from actors.scoring import find_criterion
from orchestrator.config import CampaignConfig, ExecutionConfig
from orchestrator.execution.dry_run import (
    PlannedStage,
    StageCounts,
    count_stages,
    distinct_stages,
    planned_stages,
)
from orchestrator.planning.cost_model import (
    ADAM_BYTES,
    BYTES,
    GB,
    Machine,
    StageCost,
    activation_bytes,
    block_flops,
    calibration,
    head_flops,
    kept_parameters,
    low_rank_parameters,
    seconds,
    training_block_flops,
)
from orchestrator.planning.plan import CampaignPlan, TextSize, TrajectoryPlan, num_stages
from orchestrator.scheduling.limits import Limits
from orchestrator.storage.stage_store import Store

BYTES_PER_TOKEN = 4
"""Assumption: length of a token in English text."""

TOKENS_PER_ROW = 100
"""Assumption: length of a row of a text whose size is not known."""

TASK_DOCUMENTS, TASK_REQUESTS, TASK_TOKENS = 1000, 4, 100
"""Assumption: documents of an lm-eval task, requests a document, tokens a request."""
AUTO_BATCH = 8
"""Sequences of a batch where the batch follows from the memory that there is."""

WITHOUT_TEACHER = frozenset({"healing", "sft", "sgr"})
"""Objectives that never run the unpruned model while they train."""


@dataclass(frozen=True)
class Costed:
    """A distinct stage of a campaign with what it costs, and the trajectory that asked first."""

    stage: PlannedStage
    trajectory: TrajectoryPlan
    cost: StageCost


def costed_stages(plan: CampaignPlan, store: Store | None = None) -> list[Costed]:
    """Every distinct stage of the campaign, in the order in which it is first asked for."""
    first: dict[tuple[str, str], tuple[PlannedStage, TrajectoryPlan]] = {}
    for trajectory in plan.trajectories:
        for name, stage in distinct_stages(planned_stages(trajectory, store)).items():
            first.setdefault(name, (stage, trajectory))
    return [Costed(s, t, stage_cost(s, t, plan.text_sizes)) for s, t in first.values()]


def stage_cost(
    stage: PlannedStage, trajectory: TrajectoryPlan, sizes: Mapping[TextSpec, TextSize]
) -> StageCost:
    """What one stage costs; nothing for those that only record."""
    model = COSTS.get(stage.kind)
    return model(stage, trajectory, sizes) if model else StageCost()


def _score_cost(
    stage: PlannedStage, trajectory: TrajectoryPlan, sizes: Mapping[TextSpec, TextSize]
) -> StageCost:
    spec: ScoreSpec = stage.spec
    info, criterion = trajectory.model, find_criterion(spec.criterion)
    each, layers = BYTES[info.spec.dtype], stage.layers
    weights = kept_parameters(info, layers) * each
    if criterion.by_task and spec.task:
        requests = float(layers * (spec.task.limit or TASK_DOCUMENTS) * TASK_REQUESTS * TASK_TOKENS)
        flops = (layers - 1) * block_flops(info, requests, TASK_TOKENS) + head_flops(info, requests)
        return StageCost(flops, layers * weights, weights)
    if not criterion.uses_sequences:
        return StageCost(0.0, weights, weights)
    rows, tokens = _rows_and_tokens(sizes.get(spec.calibration))
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


def _recover_cost(
    stage: PlannedStage, trajectory: TrajectoryPlan, _sizes: Mapping[TextSpec, TextSize]
) -> StageCost:
    spec: RecoverySpec = stage.spec
    info, layers, tokens = trajectory.model, stage.layers, float(trajectory.recovery_tokens)
    if not find_objective(spec.objective).applies_recovery:
        return StageCost()
    each, length = BYTES[info.spec.dtype], spec.sequence_length
    rank = None if spec.adapter.kind == "full" else spec.adapter.rank
    flops = layers * training_block_flops(info, tokens, length, rank)
    if spec.gradient_checkpointing:
        flops += layers * block_flops(info, tokens, length)
    taught = spec.objective not in WITHOUT_TEACHER
    if taught:
        flops += info.num_layers * block_flops(info, tokens, length)
    if not taught or spec.loss.logit_loss != "mse":
        # Otherwise the head is never run: its error comes from the hidden states (DESIGN §6).
        flops += (2 + taught) * head_flops(info, tokens)
    student = kept_parameters(info, layers)
    trained = student if rank is None else layers * low_rank_parameters(info, rank)
    micro = spec.micro_batch_size * length
    kept_layers = 1 if spec.gradient_checkpointing else layers
    memory = (
        (info.num_parameters if taught else student) * each
        + trained * ADAM_BYTES
        + kept_layers * activation_bytes(info, micro, length, each)
        + layers * micro * info.hidden_size * each
    )
    return StageCost(flops, info.num_parameters * each, memory)


def _evaluate_cost(
    stage: PlannedStage, trajectory: TrajectoryPlan, sizes: Mapping[TextSpec, TextSize]
) -> StageCost:
    spec: EvaluationSpec = stage.spec
    info, layers, each = trajectory.model, stage.layers, BYTES[trajectory.model.spec.dtype]
    flops, longest = 0.0, 0
    for text in spec.perplexity:
        _, tokens = _rows_and_tokens(sizes.get(text.data))
        tokens = min(tokens, text.max_tokens or tokens)
        flops += layers * block_flops(info, tokens, text.context) + head_flops(info, tokens)
        longest = max(longest, text.context)
    if spec.tasks:
        tokens = len(spec.tasks) * (spec.limit or TASK_DOCUMENTS) * TASK_REQUESTS * TASK_TOKENS
        flops += layers * block_flops(info, tokens, TASK_TOKENS) + head_flops(info, tokens)
        longest = max(longest, TASK_TOKENS * (spec.batch_size or AUTO_BATCH))
    weights = kept_parameters(info, layers) * each
    return StageCost(flops, weights, weights + longest * info.vocab_size * 4)


def _export_cost(
    stage: PlannedStage, trajectory: TrajectoryPlan, _sizes: Mapping[TextSpec, TextSize]
) -> StageCost:
    weights = kept_parameters(trajectory.model, stage.layers) * BYTES[trajectory.model.spec.dtype]
    return StageCost(0.0, 2 * weights, weights)


COSTS: dict[str, Callable[[PlannedStage, TrajectoryPlan, Mapping[TextSpec, TextSize]], StageCost]] = {
    "score": _score_cost,
    "recover": _recover_cost,
    "evaluate": _evaluate_cost,
    "export": _export_cost,
}
"""The cost model of each kind of stage; a prune only records."""


def _rows_and_tokens(size: TextSize | None) -> tuple[int, float]:
    rows = (size.num_rows if size else None) or 1000
    known = size.num_bytes if size else None
    return rows, known / BYTES_PER_TOKEN if known else rows * TOKENS_PER_ROW


def stage_devices(execution: ExecutionConfig) -> dict[str, float]:
    """Devices that a stage of each kind computes on: the GPUs it holds, or one for each of its workers."""
    scoring, training, evaluation = execution.scoring, execution.training, execution.evaluation
    return {
        "score": scoring.actors * (scoring.gpus or 1),
        "recover": training.workers * (training.gpus or 1),
        "evaluate": evaluation.gpus or 1,
        "export": evaluation.gpus or 1,
    }


def stage_seconds(
    costed: Costed, config: CampaignConfig, machine: Machine, factors: Mapping[str, float]
) -> float:
    """How long a stage takes on that machine; nothing if it only records."""
    kind = costed.stage.kind
    if kind not in COSTS or costed.cost == StageCost():
        return 0.0
    devices, dtype = stage_devices(config.execution)[kind], costed.trajectory.model.spec.dtype
    expected = seconds(costed.cost, kind, machine, devices, dtype, config.cost.utilisation)
    return expected * factors.get(kind, 1.0)


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
    """Time and price of the stages that are not finished, on `count` devices."""
    devices = stage_devices(config.execution)
    todo = [costed for costed in stages if not costed.stage.finished]
    times = [stage_seconds(costed, config, machine, factors or {}) for costed in todo]
    device_hours = sum(t * devices.get(c.stage.kind, 0) for t, c in zip(times, todo, strict=True)) / 3600
    longest: dict[str, float] = {}
    for time_s, costed in zip(times, todo, strict=True):
        longest[costed.trajectory.id] = longest.get(costed.trajectory.id, 0.0) + time_s
    hours = max(device_hours / count, max(longest.values(), default=0.0) / 3600)
    memory = max((costed.cost.memory_bytes for costed in stages), default=0.0)
    fits = memory <= machine.memory_gb * GB and count >= max(devices.values())
    return MachineEstimate(machine, count, fits, device_hours, hours, device_hours * machine.price_per_hour)


def plan_summary(
    plan: CampaignPlan,
    config: CampaignConfig,
    machines: list[tuple[int, Machine]],
    store: Store | None = None,
    factors: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What `iterabre plan` shows, as JSON values: trajectories, stages, costs, machines."""
    stages = costed_stages(plan, store)
    counts: StageCounts = count_stages(plan, store)
    kinds = [kind for kind in COSTS if any(costed.stage.kind == kind for costed in stages)]
    return {
        "trajectories": [
            {
                "trajectory": t.id,
                "model": t.model.spec.path,
                "layers": t.model.num_layers,
                "targets": [i.layers_left for i in t.iterations if i.is_target],
                "iterations": len(t.iterations),
                "stages": num_stages(t),
                "recovery_tokens": t.recovery_tokens * len(t.iterations),
                "recovery_flops": sum(
                    stage_cost(stage, t, plan.text_sizes).flops
                    for stage in planned_stages(t, store)
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
                "memory_bytes": max(c.cost.memory_bytes for c in stages if c.stage.kind == kind),
            }
            for kind in kinds
        ],
        "calibration": dict(factors or {}),
        "machines": [asdict(estimate(config, stages, n, machine, factors)) for n, machine in machines],
    }


def calibrate(
    config: CampaignConfig, plan: CampaignPlan, store: Store, ledger: pa.Table, machine: Machine
) -> dict[str, float]:
    """How much longer the stages of an earlier run took than the model says for `machine`, by kind."""
    predicted = {
        (costed.stage.kind, costed.stage.key): stage_seconds(costed, config, machine, {})
        for costed in costed_stages(plan, store)
        if costed.stage.finished
    }
    return calibration(measured_seconds(ledger), predicted)


def measured_seconds(ledger: pa.Table) -> dict[tuple[str, str], float]:
    """Seconds of every stage in a ledger, by kind and key; a shared stage once."""
    rows = ledger.select(["stage", "key", "metric", "value"]).to_pylist()
    return {(row["stage"], row["key"]): row["value"] for row in rows if row["metric"] == "seconds"}


def spent_before(ledger: pa.Table, limits: Limits) -> float:
    """Price of all stages that a run has finished so far."""
    return sum(limits.price(kind, took) for (kind, _), took in measured_seconds(ledger).items())
