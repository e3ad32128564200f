"""ZeRO's third stage: models are sharded as they are read, and what was trained is written part by part."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import nn

from actors.artifacts import fetch
from actors.contracts import AdapterSpec, RecoverySpec
from actors.models import save_weights, weights
from actors.recovery.distillation import teacher_student
from actors.recovery.distillation.teacher_student import load_teacher_student
from actors.recovery.losses.logit_losses import GRAM_ROWS, gram_matrix
from actors.recovery.objectives import find_objective
from actors.recovery.training.checkpoint import write_shard
from actors.recovery.training.engine import Engine
from actors.recovery.training.local import recover_locally
from tests.support.gloo_group import result_of, run_group, train_all
from tests.unit.recovery.test_engine import CONFIGS


@pytest.fixture(scope="module")
def full(tiny_spec: RecoverySpec) -> RecoverySpec:
    """Six steps of full fine-tuning, checkpoints after every second."""
    return replace(tiny_spec, adapter=AdapterSpec(kind="full"), learning_rate=1e-3)


def _no_weight_is_whole(rank: int, world_size: int, spec: RecoverySpec) -> None:
    pair, _ = load_teacher_student(spec)
    build = find_objective(spec.objective).build
    assert build
    module = build(pair, spec)
    counts = [parameter.numel() for parameter in module.parameters()]
    engine = Engine(module, spec, world_size, micro_batch_size=1)
    for parameter, count in zip(module.parameters(), counts, strict=True):
        assert parameter.numel() == 0
        assert parameter.ds_tensor.numel() == -(-count // world_size)
    engine.close()


def _check_and_train(rank: int, world_size: int, specs: list[RecoverySpec], directory: Path) -> None:
    for spec in specs:
        _no_weight_is_whole(rank, world_size, spec)
    train_all(rank, world_size, [(specs[-1], directory)])


def test_two_workers_hold_half_of_every_weight_and_train_what_one_does(
    tiny_spec: RecoverySpec, full: RecoverySpec, tmp_path: Path
) -> None:
    sharded = [replace(spec, deepspeed=CONFIGS["zero3"]) for spec in (tiny_spec, full)]
    run_group(2, tmp_path / "group", _check_and_train, sharded, tmp_path)
    together = result_of(tmp_path)
    alone = recover_locally(full, str(tmp_path / "alone"), tmp_path / "work")
    for ours, theirs in zip(together.steps, alone.steps, strict=True):
        assert (ours.loss, ours.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=2e-5)
    assert together.artifact
    assert alone.artifact
    mine, expected = (load_file(fetch(r.artifact) / "model.safetensors") for r in (together, alone))
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_shards_that_do_not_divide_evenly_are_read_back(full: RecoverySpec, tmp_path: Path) -> None:
    uneven = replace(full, batch_size=6, deepspeed=CONFIGS["zero3"], max_tokens=4 * 6 * 16)
    run_group(3, tmp_path / "group", train_all, [(uneven, tmp_path)])
    first = result_of(tmp_path)
    (tmp_path / "checkpoints" / "step_000004").rename(tmp_path / "last")
    run_group(3, tmp_path / "again", train_all, [(uneven, tmp_path)])
    for ours, theirs in zip(result_of(tmp_path).steps, first.steps, strict=True):
        assert (ours.loss, ours.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=2e-5)


def test_models_stay_on_the_cpu_until_they_are_sharded(
    tiny_spec: RecoverySpec, full: RecoverySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_student, "device", lambda: torch.device("meta"))
    for spec in (tiny_spec, full):
        assert load_teacher_student(spec)[0].student.device.type == "meta"
        pair, _ = load_teacher_student(replace(spec, deepspeed=CONFIGS["zero3"]))
        models = [pair.student, *([pair.teacher] if pair.teacher else [])]
        assert {p.device.type for model in models for p in model.parameters()} == {"cpu"}


def test_the_gram_matrix_is_the_same_from_parts_of_the_head() -> None:
    head = nn.Linear(16, GRAM_ROWS + 100, bias=False).weight
    whole, in_parts = gram_matrix(head), gram_matrix(head, torch.device("cpu", 0))
    torch.testing.assert_close(in_parts, whole)


@pytest.mark.parametrize("limit", ["5GB", "3KB"])
def test_weights_are_written_as_huggingface_hub_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", limit)
    tensors = {f"w{i}": torch.randn(16, 16 + i).to(torch.bfloat16) for i in range(9)}
    save_weights(tensors, tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    save_torch_state_dict(tensors, tmp_path / "theirs", max_shard_size=limit)
    ours, theirs = (
        {file.name: file.read_bytes() for file in (tmp_path / side).iterdir()} for side in ("ours", "theirs")
    )
    assert ours == theirs


def test_a_checkpoint_is_a_safetensors_file_written_one_tensor_at_a_time(tmp_path: Path) -> None:
    tensors = {"b|weight": torch.randn(3, 5), "a|weight": torch.randn(()), "c": torch.zeros(0, 4)}
    alive: list[str] = []

    def one_by_one() -> Iterator[torch.Tensor]:
        for name, tensor in tensors.items():
            alive.append(name)
            yield tensor

    write_shard(tmp_path, 0, 1, {n: t.shape for n, t in tensors.items()}, one_by_one(), {"steps": []})
    part = tmp_path / "part-0-of-1.safetensors"
    assert alive == list(tensors)
    torch.testing.assert_close(load_file(part), tensors)
    assert json.loads((tmp_path / "state.json").read_text()) == {"steps": [], "parts": 1}
