"""Recovery as a Ray Train job: the curve of one local process, whatever dies meanwhile."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.artifacts import fetch
from actors.contracts import ActorPoolSpec, RecoveryResult, RecoverySpec, TextSpec
from actors.errors import RequestError, StopRequestedError, UnexpectedError
from actors.recovery.ray import recover_on_ray
from actors.recovery.training.local import recover_locally
from tests.support.tiny_recovery import tiny_recovery_spec

pytestmark = pytest.mark.usefixtures("ray_two_cpus")

WORKERS = ActorPoolSpec(2, cpus=0.5, gpus=0, start_timeout_s=120.0)


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
        pool=WORKERS,
        max_failures=2,
    )
    assert killed.exists()
    steps_done = [int(line) for line in log.read_text().split()]
    assert steps_done[:5] == [1, 2, 3, 4, 5]
    # Goes on after the last checkpoint that Ray had committed when the worker died: step 4's or step 2's.
    assert steps_done[5:] in ([5, 6], [3, 4, 5, 6])
    _assert_same_curve(result, local)
    assert result.artifact
    assert {file.name for file in result.artifact.files} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    fetch(result.artifact)


def _assert_same_curve(result: RecoveryResult, local: RecoveryResult) -> None:
    assert [step.step for step in result.steps] == list(range(6))
    for got, want in zip(result.steps, local.steps, strict=True):
        assert (got.loss, got.grad_norm) == pytest.approx((want.loss, want.grad_norm), rel=1e-5)


class Watching:
    """A progress that writes down its reports, and does something after step `at`, once."""

    def __init__(self, directory: Path, at: int, action: Callable[[], None] = lambda: None):
        self._directory, self._at, self._action = directory, at, action

    def __call__(self, done: int, total: int, note: str = "") -> None:
        with (self._directory / "log").open("a") as file:
            file.write(f"{done} {note}\n")
        if done == self._at and not (self._directory / "acted").exists():
            (self._directory / "acted").touch()
            self._action()

    def waits_for(self, reason: str) -> None:
        with (self._directory / "waits").open("a") as file:
            file.write(f"{reason}\n")

    def runs_on(self, places: Any) -> None:
        pass

    def waited(self, seconds: float) -> None:
        pass

    def restarted(self, what: str) -> None:
        pass

    def stop_requested(self) -> bool:
        return False

    @property
    def lines(self) -> list[str]:
        return (self._directory / "log").read_text().splitlines()


def _recover(spec: RecoverySpec, directory: Path, progress: Watching, **options: Any) -> RecoveryResult:
    return recover_on_ray(
        spec,
        adapter_uri=str(directory / "adapter"),
        name="watched",
        storage_path=str(directory / "train"),
        progress_handle=progress,
        **{"pool": WORKERS, "max_failures": 2, **options},
    )


def test_an_error_of_a_worker_ends_the_training_at_once(spec: RecoverySpec, tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no such thing")

    progress = Watching(tmp_path, 3, fail)
    with pytest.raises(UnexpectedError, match="ValueError: no such thing"):
        _recover(spec, tmp_path, progress)
    assert [line.split()[0] for line in progress.lines] == ["1", "2", "3"]


@pytest.mark.long
def test_training_goes_on_with_fewer_workers_where_none_replaces_a_lost_one(
    spec: RecoverySpec, local: RecoveryResult, tmp_path: Path
) -> None:
    class Other:
        """What takes the place of the lost worker as soon as that is free."""

    other = ray.remote(num_cpus=1)(Other)
    queued = []
    progress = Watching(tmp_path, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))

    def take_the_place() -> None:
        while not (tmp_path / "log").exists():
            time.sleep(0.1)
        queued.append(other.remote())

    queue = threading.Thread(target=take_the_place)
    queue.start()
    try:
        result = _recover(
            spec, tmp_path, progress, pool=replace(WORKERS, cpus=1.0), replacement_timeout_s=5.0
        )
    finally:
        queue.join()
        ray.kill(queued[0])
    _assert_same_curve(result, local)
    assert progress.lines[-1].endswith(", on 1 of 2 workers")
    assert "within 5 s: going on with 1 of 2 workers" in (tmp_path / "waits").read_text()


@pytest.mark.long
def test_a_training_that_is_asked_to_stop_does_so_at_a_checkpoint_and_goes_on_there(
    spec: RecoverySpec, local: RecoveryResult, tmp_path: Path
) -> None:
    class Stopping(Watching):
        def restarted(self, what: str) -> None:
            pass

        def stop_requested(self) -> bool:
            return len(self.lines) == 3

    progress = Stopping(tmp_path, 0)
    with pytest.raises(StopRequestedError, match="after step 3 of 6"):
        _recover(spec, tmp_path, progress)
    result = _recover(spec, tmp_path, progress)
    _assert_same_curve(result, local)
    assert [line.split()[0] for line in progress.lines] == ["1", "2", "3", "4", "5", "6"]


def test_a_wrong_request_is_reported_as_such_and_not_tried_again(spec: RecoverySpec, tmp_path: Path) -> None:
    wrong = replace(spec, data=TextSpec(path=str(tmp_path / "nowhere.txt")))
    with pytest.raises(RequestError, match=r"nowhere\.txt"):
        recover_on_ray(
            wrong,
            adapter_uri=str(tmp_path / "adapter"),
            name="wrong",
            storage_path=str(tmp_path / "train"),
            pool=WORKERS,
        )
