"""The engine: the same curve under every ZeRO stage, number of workers, and after every change of either."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.artifacts import fetch
from actors.contracts import RecoveryResult, RecoverySpec
from actors.recovery.training.deepspeed_config import largest_micro_batch
from actors.recovery.training.engine import single_process_group
from actors.recovery.training.local import recover_locally
from actors.recovery.training.loss_scale import LossScale
from tests.support.gloo_group import result_of, run_group, train_all, with_stages

STEPS = 20
TOLERANCE = 2e-5
"""Greatest relative difference of a loss or gradient norm within 20 steps in float32: order of summation."""

# Without thresholds, weights as small as a tiny model's would stay whole under stage 3.
_SHARD_ALL = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
STAGES = {
    "zero0": {},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": _SHARD_ALL,
    "zero1_offload": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3_offload": {
        **_SHARD_ALL,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}
CONFIGS = {name: json.dumps({"zero_optimization": zero}) for name, zero in STAGES.items()}


@pytest.fixture(scope="module")
def spec(tiny_spec: RecoverySpec) -> RecoverySpec:
    return replace(
        tiny_spec, max_tokens=STEPS * 64, micro_batch_size=2, checkpoint_steps=10, weight_decay=0.01
    )


@pytest.fixture(scope="module")
def expected(spec: RecoverySpec, tmp_path_factory: pytest.TempPathFactory) -> RecoveryResult:
    directory = tmp_path_factory.mktemp("zero0")
    return recover_locally(spec, str(directory / "adapter"), directory / "work")


@pytest.fixture(scope="module")
def two_workers(spec: RecoverySpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the results, and last checkpoints, of two workers under each stage."""
    directory = tmp_path_factory.mktemp("two")
    stages = {name: config for name, config in CONFIGS.items() if not name.endswith("offload")}
    run_group(2, directory / "group", train_all, list(with_stages(spec, stages, directory)))
    return directory


@pytest.fixture(scope="module")
def two_workers_offloading(spec: RecoverySpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with offloading to the host's memory."""
    directory = tmp_path_factory.mktemp("offloading")
    stages = {name: config for name, config in CONFIGS.items() if name.endswith("offload")}
    run_group(2, directory / "group", train_all, list(with_stages(spec, stages, directory)))
    return directory


def assert_same_curve(result: RecoveryResult, expected: RecoveryResult, tolerance: float = TOLERANCE) -> None:
    assert [s.step for s in result.steps] == [s.step for s in expected.steps]
    for got, want in zip(result.steps, expected.steps, strict=True):
        assert (got.loss, got.grad_norm) == pytest.approx((want.loss, want.grad_norm), rel=tolerance)
    assert result.artifact
    assert expected.artifact
    mine, theirs = (load_file(fetch(r.artifact) / "adapter_model.safetensors") for r in (result, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", list(STAGES)[1:])
def test_one_worker_trains_the_same_under_every_stage(
    spec: RecoverySpec, expected: RecoveryResult, tmp_path: Path, name: str
) -> None:
    result = recover_locally(replace(spec, deepspeed=CONFIGS[name]), str(tmp_path / "a"), tmp_path / "work")
    assert result.trainable_parameters == expected.trainable_parameters
    assert_same_curve(result, expected)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_two_workers_train_the_same_under_every_stage(
    two_workers: Path, expected: RecoveryResult, name: str
) -> None:
    assert_same_curve(result_of(two_workers / name), expected)


@pytest.mark.long
@pytest.mark.parametrize("name", ["zero1_offload", "zero2_offload", "zero3_offload"])
def test_two_workers_train_the_same_with_offloading(
    two_workers_offloading: Path, expected: RecoveryResult, name: str
) -> None:
    assert_same_curve(result_of(two_workers_offloading / name), expected)


@pytest.mark.parametrize(
    ("before", "after"),
    [("zero2", "zero0"), ("zero3", "zero1_offload"), ("zero0", "zero3"), ("zero1", "zero2")],
)
def test_two_workers_checkpoint_is_continued_by_one_under_another_stage(
    spec: RecoverySpec, two_workers: Path, expected: RecoveryResult, tmp_path: Path, before: str, after: str
) -> None:
    halfway = "checkpoints/step_000010"
    shutil.copytree(two_workers / before / halfway, tmp_path / halfway)
    with single_process_group():
        train_all(0, 1, [(replace(spec, deepspeed=CONFIGS[after]), tmp_path)])
    result = result_of(tmp_path)
    # Steps that were not made again carry the seconds that they took then.
    assert result.steps[:10] == result_of(two_workers / before).steps[:10]
    assert_same_curve(result, expected)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("zero0", "bfloat16"), ("zero3", "bfloat16"), ("zero0", "float16"), ("zero2", "float16")],
)
def test_half_precision_follows_the_curve_of_float32(
    spec: RecoverySpec, expected: RecoveryResult, tmp_path: Path, name: str, precision: str
) -> None:
    half = replace(spec, precision=precision, deepspeed=CONFIGS[name], max_tokens=4 * 64, warmup_steps=0)
    single = replace(half, precision="float32")
    want = recover_locally(single, str(tmp_path / "single"), tmp_path / "work")
    got = recover_locally(half, str(tmp_path / "half"), tmp_path / "work")
    for ours, theirs in zip(got.steps, want.steps, strict=True):
        # bfloat16 keeps three digits, and the teacher rounds as well.
        assert (ours.loss, ours.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=0.05)
    assert got.steps[0].loss != want.steps[0].loss
    assert got.artifact
    trained = load_file(fetch(got.artifact) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["zero0", "zero2", pytest.param("zero3", marks=pytest.mark.long)])
def test_an_overflow_is_computed_again_at_a_smaller_loss_scale(
    spec: RecoverySpec, tmp_path: Path, name: str
) -> None:
    half = replace(spec, precision="float16", max_tokens=3 * 64)
    zero = json.loads(CONFIGS[name])
    usual, too_large = (
        recover_locally(
            replace(half, deepspeed=json.dumps({**zero, "fp16": {"initial_scale_power": power}})),
            str(tmp_path / f"adapter-{power}"),
            tmp_path / "work",
        )
        for power in (4, 40)
    )
    assert [step.overflows for step in usual.steps] == [0, 0, 0]
    assert too_large.steps[0].overflows > 0
    assert too_large.steps[0].loss_scale == 2.0 ** (40 - too_large.steps[0].overflows)
    for got, want in zip(too_large.steps, usual.steps, strict=True):
        assert (got.loss, got.grad_norm) == pytest.approx((want.loss, want.grad_norm), rel=0.02)


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_a_window_without() -> None:
    scale = LossScale.for_float16(initial_scale_power=1, loss_scale_window=2)
    scale.record_step(dynamic=True)
    assert scale.can_decrease
    scale.decrease()
    assert (scale.value, scale.can_decrease) == (1.0, False)
    seen = []
    for _ in range(4):
        scale.record_step(dynamic=True)
        seen.append(scale.value)
    assert seen == [1.0, 2.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("share", "at_most", "expected"), [(8, 4, 4), (8, 3, 2), (6, 3, 3), (6, 1, 1), (5, 4, 1), (2, 9, 2)]
)
def test_a_micro_batch_cuts_a_workers_share_evenly(share: int, at_most: int, expected: int) -> None:
    assert largest_micro_batch(share, at_most) == expected
