"""What stages cost: arithmetic, memory, time and price. Pure; every assumption stands in this file.

T tokens, S tokens a sequence, D hidden, V vocabulary, W width of attention (heads × head width).
Only matrix products are counted, a multiplication and an addition as two operations,
attention as the full S × S square. Times are estimates for a plan, not promises:
`iterabre plan --calibrate RUN` scales them by what an earlier run has measured.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from actors.contracts import ModelInfo
from orchestrator.config import CostConfig, MachineConfig
from orchestrator.errors import RequestError, unknown_name

TFLOP = 1e12
GB = 1e9


@dataclass(frozen=True)
class Machine:
    """A device type: peak of dense matrix products, memory, and the price of an hour."""

    name: str
    bf16_tflops: float
    fp32_tflops: float
    memory_gb: float
    price_per_hour: float


CPU_MACHINE = "CPU-core"

MACHINES = {
    machine.name: machine
    for machine in (
        Machine("B200-180G", 2250.0, 75.0, 180.0, 6.50),
        Machine("H200-141G", 989.0, 67.0, 141.0, 4.50),
        Machine("H100-80G", 989.0, 67.0, 80.0, 4.00),
        Machine("A100-80G", 312.0, 19.5, 80.0, 2.50),
        Machine("L40S-48G", 362.0, 91.6, 48.0, 1.80),
        Machine("A10G-24G", 70.0, 31.2, 24.0, 1.00),
        Machine("RTX-PRO-6000-96G", 504.0, 126.0, 96.0, 2.00),
        Machine("RTX-5090-32G", 210.0, 105.0, 32.0, 0.80),
        Machine("RTX-4090-24G", 165.0, 82.6, 24.0, 0.50),
        Machine(CPU_MACHINE, 0.05, 0.05, 8.0, 0.04),
    )
}
"""Assumptions of November 2026: peaks as their makers state them, prices (USD) as a round guess at on-demand
clouds; of RTX cards the peak is that with accumulation in float32, without sparsity.
`cost.machines` in the campaign file replaces them."""

CURRENCY = "USD"

LOAD_GB_PER_S = 1.0
"""Assumption: how fast weights come from storage to a device."""

START_S: Mapping[str, float] = {
    "score": 15.0,
    "generate": 15.0,
    "teach": 15.0,
    "recover": 45.0,
    "evaluate": 15.0,
    "export": 5.0,
}
"""Assumption: seconds until the processes of a stage work, without the loading of weights."""


class TaskSize(NamedTuple):
    """Documents of an lm-eval task, tokens of one with all its answers, and tasks of which it is a group."""

    documents: int
    tokens: int
    tasks: int = 1


TASK_SIZES: Mapping[str, TaskSize] = {
    "arc_easy": TaskSize(2376, 44),
    "arc_challenge": TaskSize(1172, 56),
    "blimp": TaskSize(67_000, 21, tasks=67),
    "blimp_sample": TaskSize(201, 21),
    "boolq": TaskSize(3270, 152),
    "copa": TaskSize(100, 22),
    "lambada_openai": TaskSize(5153, 81),
    "mmlu": TaskSize(14_042, 131, tasks=57),
    "openbookqa": TaskSize(500, 24),
    "winogrande": TaskSize(1267, 44),
}
"""Counted without examples, with SmolLM2's tokenizer, what answers begin with once."""

OTHER_TASK = TaskSize(1000, 150)
"""Assumption for any other."""

TASK_LENGTH = 100
"""Assumption: tokens of one request of a task."""

ACTIVATION_BYTES = 34
"""Bytes a token, layer and D that blocks keep for the backward pass, 16 bits (Korthikanti 2022, eq. 1)."""

ATTENTION_BYTES = 5
"""Bytes a head and pair of tokens, of the same equation."""


@dataclass(frozen=True)
class StageCost:
    """What one stage takes: operations in all, bytes of weights to load, peak bytes of one worker."""

    flops: float = 0.0
    load_bytes: float = 0.0
    memory_bytes: float = 0.0


def task_tokens(tasks: Iterable[str], limit: int | None) -> float:
    """Return the tokens that a model reads to answer so many documents of each task."""
    sizes = [TASK_SIZES.get(name, OTHER_TASK) for name in tasks]
    most = limit or math.inf
    return sum(min(size.documents, most * size.tasks) * size.tokens for size in sizes)


def kept_parameters(info: ModelInfo, layers: int) -> float:
    """Return the parameters of the model at so many layers, its blocks counted as alike."""
    return info.num_parameters - sum(info.block_parameters) * (1 - layers / info.num_layers)


def block_flops(info: ModelInfo, tokens: float, length: float) -> float:
    """Count a block's forward pass over `tokens` in sequences of `length`: 2·P·T + 4·W·S·T for attention."""
    parameters = sum(info.block_parameters) / info.num_layers
    return tokens * (2 * parameters + 4 * info.attention_width * length)


def head_flops(info: ModelInfo, tokens: float) -> float:
    """Count the output head's forward pass: 2·D·V·T."""
    return tokens * 2 * info.hidden_size * info.vocab_size


def low_rank_parameters(info: ModelInfo, rank: int) -> float:
    """Return the parameters of a low-rank update of all matrices of a block."""
    return rank * info.block_widths


def training_block_flops(info: ModelInfo, tokens: float, length: float, rank: int | None) -> float:
    """Count one block's forward and backward pass; with `rank`, its own weights are frozen.

    The backward pass of a frozen matrix costs as much as the forward pass (its input's
    gradient), that of a trained one twice as much, and attention's twice as much.
    """
    forward = block_flops(info, tokens, length)
    attention = tokens * 4 * info.attention_width * length
    if rank is None:
        return 3 * forward
    return 2 * forward + attention + 6 * tokens * low_rank_parameters(info, rank)


def activation_bytes(info: ModelInfo, tokens: float, length: float, bytes_each: int) -> float:
    """Return what one block keeps of `tokens` for its backward pass."""
    scale = bytes_each / 2
    return scale * tokens * (ACTIVATION_BYTES * info.hidden_size + ATTENTION_BYTES * info.num_heads * length)


def seconds(
    cost: StageCost, kind: str, machine: Machine, devices: float, dtype: str, utilisation: float
) -> float:
    """Return how long a stage takes on so many devices."""
    peak = machine.fp32_tflops if dtype == "float32" else machine.bf16_tflops
    start = START_S.get(kind, 0.0)
    return (
        start + cost.load_bytes / (LOAD_GB_PER_S * GB) + cost.flops / (peak * TFLOP * utilisation * devices)
    )


def calibration(
    measured: Mapping[tuple[str, str], float], predicted: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """Return measured over predicted time by kind of stage, from the stages (kind, key) that both have."""
    both = measured.keys() & predicted.keys()
    kinds = {kind for kind, _ in both}
    totals = {
        kind: [sum(times[stage] for stage in both if stage[0] == kind) for times in (measured, predicted)]
        for kind in kinds
    }
    return {kind: took / expected for kind, (took, expected) in sorted(totals.items()) if expected > 0}


def machine_at_work(cost: CostConfig, on_gpus: bool) -> Machine:
    """Return the campaign's machine; a CPU core where no stage uses a GPU."""
    return machine_of(cost, cost.machine if on_gpus else CPU_MACHINE)


def machine_of(cost: CostConfig, name: str) -> Machine:
    """Return the machine of that name, as the campaign file changes it.

    Raises:
        RequestError: no such machine, or a new one that is not described in full.
    """
    changes = cost.machines.get(name)
    given = {} if changes is None else changes.model_dump(exclude_none=True)
    if name in MACHINES:
        return replace(MACHINES[name], **given)
    if changes is None:
        error = unknown_name("machine", name, {*MACHINES, *cost.machines})
        fields = ", ".join(MachineConfig.model_fields)
        raise RequestError(
            f"{error}; or describe it in the campaign file: cost.machines.{name} with {fields}"
        )
    missing = type(changes).model_fields.keys() - given.keys()
    if missing:
        raise RequestError(f"cost.machines.{name} is no known machine and lacks {', '.join(sorted(missing))}")
    return Machine(name, **given)


def parse_machine(text: str, cost: CostConfig) -> tuple[int, Machine]:
    """Parse `8xH100-80G` as a number of devices and their type; a bare type is one device.

    Raises:
        RequestError: not written so, or no such machine.
    """
    count, separator, name = text.partition("x")
    if not separator or not count.isdecimal():
        return 1, machine_of(cost, text)
    if int(count) < 1:
        raise RequestError(f"--machine {text!r}: write it as 8xH100-80G, with at least one device")
    return int(count), machine_of(cost, name)
