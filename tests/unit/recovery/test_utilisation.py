"""The operations of a micro-batch, counted and by hand, and the peaks of devices."""

from pathlib import Path

import pytest
import torch
from torch import nn

from actors.contracts import RecoveryResult, RecoverySpec, StepRecord
from actors.recovery.training.local import recover_locally
from actors.recovery.training.utilisation import FlopCounter, peak_of
from orchestrator.execution.stage_kinds import recovery_numbers


def test_a_linear_layer_costs_three_products_and_a_frozen_one_two() -> None:
    rows_NI, product = torch.randn(5, 7, requires_grad=True), 2 * 5 * 7 * 11
    layer = nn.Linear(7, 11, bias=False)
    for trained, products in ((True, 3), (False, 2)):
        layer.requires_grad_(trained)
        with FlopCounter() as counter:
            layer(rows_NI).sum().backward()
        assert counter.flops == products * product
    with FlopCounter() as counter:
        torch.zeros(5, 11).addmm_(rows_NI.detach(), torch.randn(7, 11))
    assert counter.flops == product


def test_a_recovery_counts_its_operations(tiny_spec: RecoverySpec, tmp_path: Path) -> None:
    result = recover_locally(tiny_spec, str(tmp_path / "a"), tmp_path / "work")
    # The teacher's four blocks forward, the student's three forward and back to their inputs: 10 passes
    # through frozen weights, and little more for adapters, attention and the Gram matrix.
    block = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert 10 * block < result.flops_per_token < 14 * block
    assert result.peak_flops == 0


@pytest.mark.parametrize(
    ("name", "sixteen_bits", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 495e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("Something else", 0.0, 0.0),
    ],
)
def test_peaks_go_by_the_name_of_the_device(name: str, sixteen_bits: float, float32: float) -> None:
    assert (peak_of(name, "bfloat16"), peak_of(name, "float32")) == (sixteen_bits, float32)


def test_the_ledger_gets_the_utilisation_where_the_peak_is_known() -> None:
    step = StepRecord(0, 1000, 1.0, (), 1e-3, 1.0, 2.0)
    known = RecoveryResult(None, (step,), 1000, 5, flops_per_token=1e9, peak_flops=2e12)
    numbers = {metric: value for metric, value, *_ in recovery_numbers(known)}
    assert numbers["mfu"] == pytest.approx(500 * 1e9 / 2e12)
    assert numbers["flops_per_token"] == 1e9
    unknown = RecoveryResult(None, (step,), 1000, 5)
    assert not {"mfu", "flops_per_token"} & {metric for metric, *_ in recovery_numbers(unknown)}
