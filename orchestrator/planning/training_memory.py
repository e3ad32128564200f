"""What a worker of a recovery holds on its device: weights, optimizer, and what the backward pass needs.

D hidden, V vocabulary. Pure arithmetic; the allocator's waste and the buckets of collectives are not counted.
"""

from dataclasses import dataclass
from typing import Any

from actors.contracts import DTYPE_BYTES, ModelInfo, RecoverySpec
from actors.recovery.training.deepspeed_config import parse, zero_stage
from orchestrator.planning.cost_model import (
    activation_bytes,
    kept_parameters,
    low_rank_parameters,
)

NF4_BYTES = {True: 4.127 / 8, False: 4.5 / 8}
"""Bytes of a 4-bit weight and its share of the scales, with and without double quantisation (QLoRA §3)."""

WEIGHT, GRADIENT, MASTER, MOMENTS = 4, 4, 4, 8
"""Bytes of a trained parameter, all in float32; DeepSpeed's stages keep a master copy beside the weight."""

GATHERED_BLOCKS = 2
"""Blocks whose weights the third stage has whole at a time: the one at work and the one that is fetched."""


@dataclass(frozen=True)
class _Sharding:
    """Bytes on the device of a trained parameter, and the shares of it and of a frozen one that are there."""

    trained: float
    frozen: float


def training_memory(spec: RecoverySpec, info: ModelInfo, layers: int, workers: int, taught: bool) -> float:
    """Return the bytes on the device of one worker, at its peak.

    Args:
        layers: of the student.
        workers: that share what ZeRO shards.
        taught: whether the unpruned model runs, too.
    """
    each, full = DTYPE_BYTES[spec.precision or info.spec.dtype], spec.adapter.kind == "full"
    sharding, student = _sharding(spec, workers), kept_parameters(info, layers)
    trained_layers = layers - min(spec.first_trainable, layers)
    trained = student if full else trained_layers * low_rank_parameters(info, spec.adapter.rank)
    model = info.num_parameters if taught else student
    blocks = sum(info.block_parameters) * (1.0 if taught else layers / info.num_layers)
    frozen = float(model * each)
    if full:
        frozen = float(info.num_parameters * each if taught else 0)
    elif spec.adapter.kind == "qlora":
        frozen = (model - blocks) * each + blocks * NF4_BYTES[spec.adapter.double_quantization]
    micro = spec.micro_batch_size * spec.sequence_length
    kept_layers = 1 if spec.gradient_checkpointing is True else trained_layers
    return (
        frozen * sharding.frozen
        + trained * sharding.trained
        + _gathered(spec, info, 4 if full else each)
        + kept_layers * activation_bytes(info, micro, spec.sequence_length, each)
        + trained_layers * micro * info.hidden_size * each
    )


def _gathered(spec: RecoverySpec, info: ModelInfo, each: int) -> float:
    """Return the bytes of weights that the third stage has whole at a time: some blocks, and the head."""
    if zero_stage(spec) < 3:
        return 0.0
    block = max(info.block_parameters, default=0)
    return float(each * (GATHERED_BLOCKS * block + info.hidden_size * info.vocab_size))


def _sharding(spec: RecoverySpec, workers: int) -> _Sharding:
    """Return what is left on the device under the ZeRO stage and the offloading of `spec`."""
    zero: dict[str, Any] = parse(spec.deepspeed).get("zero_optimization", {})
    stage = zero_stage(spec)
    on_device = 0.0 if zero.get("offload_optimizer", {}).get("device") == "cpu" else 1.0 / workers
    if stage == 0:
        return _Sharding(WEIGHT + GRADIENT + MOMENTS, 1.0)
    if stage == 1:
        return _Sharding(WEIGHT + GRADIENT + (MASTER + MOMENTS) * on_device, 1.0)
    if stage == 2:
        return _Sharding(WEIGHT + (GRADIENT + MASTER + MOMENTS) * on_device, 1.0)
    weights = 0.0 if zero.get("offload_param", {}).get("device") == "cpu" else 1.0 / workers
    return _Sharding(WEIGHT * weights + (GRADIENT + MASTER + MOMENTS) * on_device, weights)
