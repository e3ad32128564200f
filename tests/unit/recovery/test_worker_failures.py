"""What the failures of a training's workers mean: a loss, a lack of memory, or an error that ends it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from actors.contracts import no_progress
from actors.errors import MemoryExhaustedError, StorageUnavailableError, UnexpectedError
from actors.recovery.ray import _cause_of_failure, _error_of_worker, _WorkersLostError
from actors.recovery.ray_worker import RecoveryJob
from actors.recovery.training.failures import MicroBatchError
from tests.support.tiny_recovery import tiny_recovery_spec

PEER = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:1")
LOST = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())


def raised(error: BaseException) -> BaseException:
    return UserExceptionWithTraceback(error, "Traceback")


@pytest.fixture
def job(tmp_path: Path) -> RecoveryJob:
    spec = tiny_recovery_spec(tmp_path)
    return RecoveryJob(spec, str(tmp_path / "adapter"), str(tmp_path / "hint"), no_progress, 2)


def meaning(job: RecoveryJob, *failures: BaseException) -> Any:
    return _cause_of_failure(job, "recovery", [_error_of_worker(each) for each in failures])


@pytest.mark.parametrize(
    "failures",
    [
        (LOST,),
        (raised(PEER), LOST),
        (raised(PEER), raised(PEER)),
        (WorkerHealthCheckTimeoutError("no answer"), raised(PEER)),
    ],
    ids=["a process", "a process and its peer", "peers alone", "a hang"],
)
def test_losses_are_tried_again(job: RecoveryJob, failures: tuple[BaseException, ...]) -> None:
    error = meaning(job, *failures)
    assert isinstance(error, _WorkersLostError)
    assert not error.announced


def test_a_loss_that_was_announced_is_no_failure(job: RecoveryJob) -> None:
    lost = ActorDiedError()
    lost._preempted = True
    assert meaning(job, raised(PEER), WorkerHealthCheckFailedError("", lost)).announced


def test_an_error_of_ones_own_ends_it_whatever_its_peers_say(job: RecoveryJob) -> None:
    error = meaning(job, raised(PEER), raised(ValueError("no such thing")))
    assert isinstance(error, UnexpectedError)
    assert "failed: ValueError: no such thing: this is a fault of iterabre or of a plug-in" in str(error)
    away = StorageUnavailableError("s3://bucket did not answer")
    assert meaning(job, raised(PEER), raised(away)) is away


def test_a_worker_ended_for_want_of_memory_makes_micro_batches_smaller(job: RecoveryJob) -> None:
    sizes = []
    while isinstance(error := meaning(job, OutOfMemoryError("killed"), raised(PEER)), MicroBatchError):
        sizes.append(int(Path(job.micro_batch_hint_uri).read_text()))
    assert sizes == [job.spec.micro_batch_size // 2 ** (i + 1) for i in range(len(sizes))]
    assert sizes[-1:] in ([1], [])
    assert isinstance(error, MemoryExhaustedError)
    assert "recovery.gradient_checkpointing" in str(error)
    assert isinstance(meaning(job, raised(torch.OutOfMemoryError("CUDA"))), MemoryExhaustedError)
