"""Recovery as a Ray Train job: the curve of one local process, whatever dies meanwhile."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from actors.artifacts import fetch
from actors.contracts import RecoveryResult, RecoverySpec, TextSpec
from actors.errors import RequestError
from actors.recovery.ray import recover_on_ray
from actors.recovery.training.local import recover_locally
from tests.support.tiny_recovery import tiny_recovery_spec

pytestmark = pytest.mark.usefixtures("ray_two_cpus")

WORKERS = {"workers": 2, "cpus_per_worker": 0.5, "start_timeout_s": 120.0, "max_failures": 2}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> RecoverySpec:
    zero_2 = '{"zero_optimization": {"stage": 2}}'
    return replace(tiny_recovery_spec(tmp_path_factory.mktemp("recovery")), deepspeed=zero_2)


@pytest.fixture(scope="module")
def local(spec: RecoverySpec, tmp_path_factory: pytest.TempPathFactory) -> RecoveryResult:
    directory = tmp_path_factory.mktemp("local")
    return recover_locally(spec, str(directory / "adapter"), directory / "work")


def test_a_worker_killed_midway_is_replaced_and_the_curve_is_that_of_one_process(
    spec: RecoverySpec, local: RecoveryResult, tmp_path: Path
) -> None:
    killed, log = tmp_path / "killed", tmp_path / "log"

    def kill_once(done: int, total: int, note: str = "") -> None:
        with log.open("a") as file:
            file.write(f"{done}\n")
        if done == 5 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    result = recover_on_ray(
        spec,
        adapter_uri=str(tmp_path / "adapter"),
        name="killed-midway",
        storage_path=str(tmp_path / "train"),
        progress_handle=kill_once,
        **WORKERS,
    )
    assert killed.exists()
    steps_done = [int(line) for line in log.read_text().split()]
    assert steps_done[:5] == [1, 2, 3, 4, 5]
    # Goes on after the last checkpoint that Ray had committed when the worker died: step 4's or step 2's.
    assert steps_done[5:] in ([5, 6], [3, 4, 5, 6])
    assert [step.step for step in result.steps] == list(range(6))
    for got, want in zip(result.steps, local.steps, strict=True):
        assert (got.loss, got.grad_norm) == pytest.approx((want.loss, want.grad_norm), rel=1e-5)
    assert result.artifact
    assert {file.name for file in result.artifact.files} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    fetch(result.artifact)


def test_a_wrong_request_is_reported_as_such_and_not_tried_again(spec: RecoverySpec, tmp_path: Path) -> None:
    wrong = replace(spec, data=TextSpec(path=str(tmp_path / "nowhere.txt")))
    with pytest.raises(RequestError, match=r"nowhere\.txt"):
        recover_on_ray(
            wrong,
            adapter_uri=str(tmp_path / "adapter"),
            name="wrong",
            storage_path=str(tmp_path / "train"),
            **WORKERS,
        )
