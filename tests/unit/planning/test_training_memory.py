"""The memory of a recovery's worker, by hand: every ZeRO stage, offloading, and 4-bit weights."""

import json
from dataclasses import replace

import pytest

from actors.contracts import AdapterSpec, ModelInfo, ModelRef, ModelSpec, RecoverySpec, TextSpec
from orchestrator.planning.cost_model import activation_bytes
from orchestrator.planning.training_memory import training_memory

N, BLOCK, HEAD = 10, 1_000_000, 500_000
INFO = ModelInfo(
    spec=ModelSpec("m", "bfloat16"),
    model_type="llama",
    num_layers=N,
    num_parameters=N * BLOCK + HEAD,
    vocab_size=1000,
    fingerprint="f",
    block_parameters=(BLOCK,) * N,
    hidden_size=500,
    attention_width=500,
    num_heads=4,
    block_widths=7000,
)
LORA = RecoverySpec(
    model=ModelRef(INFO.spec),
    data=TextSpec(path="t"),
    adapter=AdapterSpec(rank=8),
    sequence_length=64,
    micro_batch_size=2,
)
FULL = replace(LORA, adapter=AdapterSpec(kind="full"))
LAYERS, WORKERS = 8, 4
KEPT = LAYERS * activation_bytes(INFO, 128, 64, 2) + LAYERS * 128 * 500 * 2
MODEL, STUDENT, TRAINED = INFO.num_parameters, LAYERS * BLOCK + HEAD, LAYERS * 8 * 7000
WHOLE = 2 * BLOCK + 500 * 1000


def _zero(spec: RecoverySpec, **zero: object) -> RecoverySpec:
    return replace(spec, deepspeed=json.dumps({"zero_optimization": zero}))


OPTIMIZER, WEIGHTS = {"offload_optimizer": {"device": "cpu"}}, {"offload_param": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (LORA, 2 * MODEL + 16 * TRAINED),
        (_zero(LORA, stage=1), 2 * MODEL + (8 + 12 / 4) * TRAINED),
        (_zero(LORA, stage=2), 2 * MODEL + (4 + 16 / 4) * TRAINED),
        (_zero(LORA, stage=2, **OPTIMIZER), 2 * MODEL + 4 * TRAINED),
        (_zero(LORA, stage=3), 2 * MODEL / 4 + 20 / 4 * TRAINED + 2 * WHOLE),
        (_zero(LORA, stage=3, **OPTIMIZER, **WEIGHTS), 2 * WHOLE),
        (FULL, 2 * MODEL + 16 * STUDENT),
        (_zero(FULL, stage=3), 2 * MODEL / 4 + 20 / 4 * STUDENT + 4 * WHOLE),
        (
            replace(LORA, adapter=AdapterSpec(kind="qlora", rank=8)),
            2 * HEAD + 4.127 / 8 * N * BLOCK + 16 * TRAINED,
        ),
    ],
    ids=[
        "stage 0", "1", "2", "2 offloaded", "3", "3 offloaded", "full", "full 3", "4 bits",
    ],
)  # fmt: skip
def test_weights_and_optimizer_by_hand(spec: RecoverySpec, expected: float) -> None:
    assert training_memory(spec, INFO, LAYERS, WORKERS, taught=True) == pytest.approx(expected + KEPT)


def test_without_a_teacher_only_the_student_is_there() -> None:
    lora = training_memory(LORA, INFO, LAYERS, WORKERS, taught=False)
    assert lora == pytest.approx(2 * STUDENT + 16 * TRAINED + KEPT)
    full = training_memory(FULL, INFO, LAYERS, WORKERS, taught=False)
    assert full == pytest.approx(16 * STUDENT + KEPT)
