"""The engine: the same curve under every ZeRO stage, number of workers, and after every change of either."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import torch
from actors.artifacts import fetch
from actors.contracts import RecoveryResult, RecoverySpec
from actors.recovery.local import recover_locally
from tests.gloo_group import result_of, run_group, train_all, with_stages

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
    return replace(tiny_spec, max_tokens=STEPS * 64, checkpoint_steps=10, weight_decay=0.01)


@pytest.fixture(scope="module")
def expected(spec: RecoverySpec, tmp_path_factory: pytest.TempPathFactory) -> RecoveryResult:
    directory = tmp_path_factory.mktemp("zero0")
    return recover_locally(spec, str(directory / "adapter"), directory / "work")


@pytest.fixture(scope="module")
def two_workers(spec: RecoverySpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the results, and last checkpoints, of two workers under each configuration."""
    directory = tmp_path_factory.mktemp("two")
    run_group(2, directory / "group", train_all, list(with_stages(spec, CONFIGS, directory)))
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


@pytest.mark.parametrize("name", STAGES)
def test_two_workers_train_the_same_under_every_stage(
    two_workers: Path, expected: RecoveryResult, name: str
) -> None:
    assert_same_curve(result_of(two_workers / name), expected)
