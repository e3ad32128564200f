"""The training loop: the curve is the same on one worker, on two, and after an interruption."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist

from actors.artifacts import fetch
from actors.contracts import (
    AdapterSpec,
    LossSpec,
    RecoveryResult,
    RecoverySpec,
    TextSpec,
)
from actors.errors import RequestError
from actors.recovery import check_recovery
from actors.recovery.training.deepspeed_config import deepspeed_config, optimizer_settings, zero_stage
from actors.recovery.training.local import recover_locally
from actors.recovery.training.train_loop import DivergenceError, train
from tests.support.gloo_group import group_train_context, run_group

ZERO2 = json.dumps({"zero_optimization": {"stage": 2}})


@pytest.fixture(scope="module")
def undisturbed(tiny_spec: RecoverySpec, tmp_path_factory: pytest.TempPathFactory) -> RecoveryResult:
    directory = tmp_path_factory.mktemp("undisturbed")
    return recover_locally(tiny_spec, str(directory / "adapter"), directory / "work")


def _curve(result: RecoveryResult) -> list[tuple[float, ...]]:
    return [(s.loss, s.grad_norm, s.learning_rate, *(value for _, value in s.terms)) for s in result.steps]


def _assert_same(result: RecoveryResult, expected: RecoveryResult) -> None:
    assert [s.step for s in result.steps] == [s.step for s in expected.steps]
    for got, want in zip(_curve(result), _curve(expected), strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    assert result.artifact
    assert expected.artifact
    mine, theirs = (load_file(fetch(r.artifact) / "adapter_model.safetensors") for r in (result, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_the_result_counts_what_was_done(tiny_spec: RecoverySpec, undisturbed: RecoveryResult) -> None:
    assert [s.step for s in undisturbed.steps] == list(range(6))
    assert undisturbed.tokens == sum(s.tokens for s in undisturbed.steps) == 6 * 64
    # Rank 4 on seven linear layers of three blocks: r (in + out) each.
    per_block = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert undisturbed.trainable_parameters == 3 * per_block
    first = undisturbed.steps[0]
    assert first.loss == pytest.approx(sum(value for _, value in first.terms))
    assert first.learning_rate == pytest.approx(tiny_spec.learning_rate / 2)


def test_training_lowers_the_loss(tiny_spec: RecoverySpec, tmp_path: Path) -> None:
    result = recover_locally(replace(tiny_spec, max_tokens=30 * 64), str(tmp_path / "a"), tmp_path / "work")
    losses = [step.loss for step in result.steps]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_batches_are_the_same_however_they_are_cut(
    tiny_spec: RecoverySpec, undisturbed: RecoveryResult, tmp_path: Path
) -> None:
    spec = replace(tiny_spec, micro_batch_size=4, adapter=replace(tiny_spec.adapter, dropout=0.0))
    whole = recover_locally(spec, str(tmp_path / "a"), tmp_path / "w")
    cut = recover_locally(replace(spec, micro_batch_size=2), str(tmp_path / "b"), tmp_path / "w")
    _assert_same(cut, whole)


def test_zero_2_trains_the_same(tiny_spec: RecoverySpec, undisturbed: RecoveryResult, tmp_path: Path) -> None:
    _assert_same(
        recover_locally(replace(tiny_spec, deepspeed=ZERO2), str(tmp_path / "a"), tmp_path), undisturbed
    )


def _one_is_wrong(rank: int, world_size: int, spec: RecoverySpec, directory: Path) -> None:
    wrong = replace(spec, data=TextSpec(path="nowhere.txt")) if rank == 1 else spec
    with pytest.raises(RequestError, match=r"nowhere\.txt"):
        train(wrong, group_train_context(rank, world_size, directory))


def test_an_error_of_one_worker_is_raised_by_all(tiny_spec: RecoverySpec, tmp_path: Path) -> None:
    run_group(2, tmp_path / "group", _one_is_wrong, tiny_spec, tmp_path)
    assert not (tmp_path / "adapter").exists()


class _Interrupted(Exception):
    """Stands for the death of the process."""


def _stop_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, note: str = "") -> None:
        if done == step:
            raise _Interrupted

    return progress


@pytest.mark.parametrize("deepspeed", ["{}", ZERO2], ids=["zero0", "zero2"])
def test_an_interrupted_run_goes_on_from_its_checkpoint_to_the_same_end(
    tiny_spec: RecoverySpec, undisturbed: RecoveryResult, tmp_path: Path, deepspeed: str
) -> None:
    spec = replace(tiny_spec, deepspeed=deepspeed)
    with pytest.raises(_Interrupted):
        recover_locally(spec, str(tmp_path / "a"), tmp_path / "work", _stop_at(5))
    seen: list[int] = []
    resumed = recover_locally(
        spec, str(tmp_path / "a"), tmp_path / "work", lambda done, total, note: seen.append(done)
    )
    assert seen == [5, 6]
    _assert_same(resumed, undisturbed)
    assert not list((tmp_path / "work").iterdir())


def test_checkpoints_of_another_request_are_not_used(tiny_spec: RecoverySpec, tmp_path: Path) -> None:
    with pytest.raises(_Interrupted):
        recover_locally(tiny_spec, str(tmp_path / "a"), tmp_path / "work", _stop_at(3))
    seen: list[int] = []
    other = replace(tiny_spec, seed=4)
    recover_locally(other, str(tmp_path / "a"), tmp_path / "work", lambda done, _t, _n: seen.append(done))
    assert seen[0] == 1


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    tiny_spec: RecoverySpec, tmp_path: Path
) -> None:
    spec = replace(tiny_spec, learning_rate=1e30, max_grad_norm=0.0, warmup_steps=0, checkpoint_steps=1)
    with pytest.raises(DivergenceError, match=r"step \d of 6 .*sequences \[.*checkpoint"):
        recover_locally(spec, str(tmp_path / "a"), tmp_path / "work")
    assert not (tmp_path / "a").exists()


def test_none_trains_nothing(tiny_spec: RecoverySpec, tmp_path: Path) -> None:
    result = recover_locally(replace(tiny_spec, objective="none"), str(tmp_path / "a"), tmp_path)
    assert result == RecoveryResult(artifact=None, steps=(), tokens=0, trainable_parameters=0)


_NVME = '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}'


def _bad_requests() -> Iterator[tuple[dict[str, object], str]]:
    yield {"objective": "kdd"}, "kdd"
    yield {"batch_size": 5, "micro_batch_size": 2}, r"batch_size 5 .*micro_batch_size 2 x 1 workers = 2"
    yield {"max_tokens": 63}, "63 .*4 x 16 = 64"
    yield {"batch_size": 4000, "max_tokens": 10**6}, "4000"
    yield {"lr_schedule": "expo"}, "expo"
    yield {"deepspeed": "{"}, "JSON"
    yield {"deepspeed": "[]"}, "object"
    yield {"deepspeed": '{"train_batch_size": 7}'}, "train_batch_size.*batch_size"
    yield {"deepspeed": '{"train_micro_batch_size_per_gpu": 3}'}, "train_micro_batch_size.* is 3.*give 1"
    yield {"deepspeed": '{"gradient_accumulation_steps": 3}'}, "gradient_accumulation_steps.* is 3.*give 4"
    yield {"deepspeed": '{"gradient_clipping": 9}'}, "gradient_clipping.*max_grad_norm"
    yield {"deepspeed": '{"optimizer": {"type": "Lamb"}}'}, r"optimizer\.type.*'Lamb'.*AdamW"
    yield {"deepspeed": '{"optimizer": {"params": {"lr": 0.5}}}'}, r"optimizer\.params\.lr.*0\.5.*0\.01"
    yield {"deepspeed": '{"optimizer": {"params": {"amsgrad": true}}}'}, "amsgrad"
    yield {"deepspeed": '{"scheduler": {"type": "OneCycle"}}'}, "scheduler.*lr_schedule"
    yield {"deepspeed": '{"bf16": {"enabled": true}}'}, r"bf16\.enabled.*precision"
    yield {"precision": "bfloat16", "deepspeed": '{"fp16": {"enabled": true}}'}, r"fp16\.enabled.*precision"
    yield {"deepspeed": '{"torch_autocast": {"enabled": true}}'}, "torch_autocast"
    yield {"deepspeed": '{"zero_optimization": {"stage": 4}}'}, "stage.*4"
    yield {"deepspeed": '{"zero_optimization": 2}'}, "zero_optimization.*object"
    yield (
        {"deepspeed": '{"zero_optimization": {"offload_param": {"device": "cpu"}}}'},
        "offload_param.*stage 3",
    )
    yield {"deepspeed": _NVME}, "offload_optimizer.*nvme"
    yield (
        {"adapter": AdapterSpec(dora=True), "deepspeed": '{"zero_optimization": {"stage": 3}}'},
        "stage' is 3.*adapter.dora",
    )
    yield {"precision": "float8"}, "float8"
    yield (
        {"sequence_length": 4000, "max_tokens": 10**6},
        "2189 tokens, fewer than one sequence of 4000; give more text",
    )
    yield {"adapter": AdapterSpec(targets=("wq",))}, "'wq' names no linear layer.*q_proj"
    yield {"loss": LossSpec(0, 0, 0)}, "weight"
    yield {"data": TextSpec(path="nowhere.txt")}, "nowhere.txt"


@pytest.mark.parametrize(("changes", "message"), _bad_requests())
def test_a_wrong_request_is_refused_and_leaves_no_group_behind(
    tiny_spec: RecoverySpec, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        recover_locally(replace(tiny_spec, **changes), str(tmp_path / "a"), tmp_path)
    assert not dist.is_initialized()
    assert not list(tmp_path.iterdir())


def test_fields_given_as_auto_are_filled_in(tiny_spec: RecoverySpec) -> None:
    user = {"train_batch_size": "auto", "optimizer": "auto", "zero_optimization": {"stage": 1}}
    config = deepspeed_config(replace(tiny_spec, deepspeed=json.dumps(user)), world_size=2)
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (4, 2)
    assert config["zero_optimization"] == {"stage": 1}


def test_every_shipped_deepspeed_file_goes_with_recovery(tiny_spec: RecoverySpec) -> None:
    files = sorted(Path(__file__).parents[3].glob("configs/deepspeed/*.json"))
    assert len(files) == 5
    for file in files:
        spec = replace(tiny_spec, deepspeed=file.read_text(), precision="bfloat16")
        check_recovery(spec, workers=2)
        assert zero_stage(spec) == int(file.stem.removeprefix("zero")[0])


def test_what_the_json_says_of_the_optimizer_is_kept(tiny_spec: RecoverySpec) -> None:
    user = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.8, 0.9], "torch_adam": True}}}
    assert optimizer_settings(replace(tiny_spec, deepspeed=json.dumps(user))) == {"betas": [0.8, 0.9]}
