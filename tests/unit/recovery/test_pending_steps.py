"""Numbers that stay on the device: the same records, and steps that are not finite change no weight."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import LongTensor, nn

from actors.contracts import RecoveryResult, RecoverySpec
from actors.data import ReadAhead, TokenBatch
from actors.errors import MemoryExhaustedError
from actors.recovery.training import train_loop, training_run
from actors.recovery.training.engine import Engine, single_process_group
from actors.recovery.training.failures import DivergenceError
from actors.recovery.training.local import recover_locally
from actors.recovery.training.pending_steps import PendingStep, read_steps
from tests.support.packed_data import packed_blocks


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but with an interval that never ends."""
    monkeypatch.setattr(train_loop, "read_interval_s", lambda _: math.inf)


@pytest.fixture(scope="module")
def every_step(tiny_spec: RecoverySpec, tmp_path_factory: pytest.TempPathFactory) -> RecoveryResult:
    directory = tmp_path_factory.mktemp("every_step")
    return recover_locally(tiny_spec, str(directory / "adapter"), directory / "work")


def test_numbers_read_together_are_those_read_step_by_step(
    tiny_spec: RecoverySpec, every_step: RecoveryResult, tmp_path: Path, deferred: None
) -> None:
    seen: list[int] = []
    result = recover_locally(tiny_spec, str(tmp_path / "a"), tmp_path / "w", lambda n, *_: seen.append(n))
    # They are read where a checkpoint is due: after every second step.
    assert seen == [2, 4, 6]
    timeless = [replace(step, seconds=0.0, peak_memory_bytes=0) for step in result.steps]
    assert timeless == [replace(step, seconds=0.0, peak_memory_bytes=0) for step in every_step.steps]
    assert result.artifact
    assert every_step.artifact
    assert result.artifact.sha256 == every_step.artifact.sha256


def test_a_deferred_divergence_names_the_first_step_and_leaves_no_checkpoint_of_it(
    tiny_spec: RecoverySpec, tmp_path: Path, deferred: None
) -> None:
    spec = replace(tiny_spec, learning_rate=1e30, max_grad_norm=0.0, warmup_steps=0, checkpoint_steps=5)
    with pytest.raises(DivergenceError, match=r"step [2-5] of 6 .*no checkpoint"):
        recover_locally(spec, str(tmp_path / "a"), tmp_path / "work")
    assert not list(tmp_path.glob("work/*/step_*"))


class _Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * batch.input_ids_BT).sum()}


@pytest.mark.parametrize(
    ("gradient", "loss", "changes"), [(1.0, 1.0, True), (math.nan, 1.0, False), (1.0, math.inf, False)]
)
def test_a_step_that_is_not_finite_is_dropped_without_the_host(
    tiny_spec: RecoverySpec, gradient: float, loss: float, changes: bool
) -> None:
    module = _Line()
    spec = replace(tiny_spec, batch_size=1, micro_batch_size=1)
    with single_process_group():
        engine = Engine(module, spec, 1, 1)
        batch = TokenBatch(torch.tensor([gradient, gradient]))
        engine.accumulate(batch, last=True)
        engine.step(0.1, torch.tensor(loss))
        assert (module.weight.tolist() != [1.0, 2.0]) == changes
        # The next step is as if there had been none before it.
        engine.accumulate(TokenBatch(torch.ones(2)), last=True)
        engine.step(0.1, torch.tensor(1.0))
        engine.close()
    steps = 2 if changes else 1
    torch.testing.assert_close(module.weight.detach(), torch.tensor([1.0, 2.0]) - 0.1 * steps)


def test_steps_read_together_share_their_time() -> None:
    now = time.perf_counter()
    terms = {"hidden": torch.tensor(0.5), "loss": torch.tensor(1.5)}
    pending = [
        PendingStep(step, 64, terms, torch.tensor(2.0), 1e-3, started=now - 4 + step) for step in range(4)
    ]
    records = read_steps(pending, peak_memory_bytes=7)
    assert [(r.step, r.loss, r.terms, r.grad_norm) for r in records] == [
        (step, 1.5, (("hidden", 0.5),), 2.0) for step in range(4)
    ]
    assert {r.peak_memory_bytes for r in records} == {7}
    assert [r.seconds for r in records] == pytest.approx([1.0] * 4, abs=0.2)
    assert read_steps([]) == []


# Reading ahead


@pytest.fixture
def reader() -> Iterator[tuple[ReadAhead, list[list[int]]]]:
    data, asked = packed_blocks(torch.arange(24).view(6, 4)), []

    def read(chosen_B: LongTensor) -> TokenBatch:
        asked.append(chosen_B.tolist())
        return data.batch(chosen_B)

    ahead = ReadAhead(read)
    yield ahead, asked
    ahead.close()


def _ids(*ids: int) -> LongTensor:
    return torch.tensor(ids)  # type: ignore[return-value]


def test_the_announced_batch_is_read_once_and_another_is_read_all_the_same(
    reader: tuple[ReadAhead, list[list[int]]],
) -> None:
    ahead, asked = reader
    assert ahead.batch(_ids(0, 1), _ids(2)).input_ids_BT.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ahead.batch(_ids(2), _ids(3)).input_ids_BT.tolist() == [[8, 9, 10, 11]]
    assert ahead.batch(_ids(5)).input_ids_BT.tolist() == [[20, 21, 22, 23]]
    assert asked == [[0, 1], [2], [3], [5]]


def test_an_error_of_reading_is_raised_where_the_batch_is_taken() -> None:
    def fails(chosen_B: LongTensor) -> TokenBatch:
        raise OSError("gone")

    ahead = ReadAhead(fails)
    with pytest.raises(OSError, match="gone"):
        ahead.batch(_ids(0))
    ahead.close()


def test_models_that_do_not_fit_end_with_the_remedy(
    tiny_spec: RecoverySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(training_run, "load_teacher_student", full)
    with pytest.raises(MemoryExhaustedError, match=r"do not fit .*\(RuntimeError: CUDA error.*zero3"):
        recover_locally(tiny_spec, str(tmp_path / "a"), tmp_path / "work")


def test_memory_that_runs_out_in_the_optimizer_step_makes_micro_batches_smaller(
    tiny_spec: RecoverySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, sizes = Engine.step, []

    def tight(engine: Engine, learning_rate: float, loss: torch.Tensor) -> torch.Tensor:
        if not sizes:
            sizes.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(engine, learning_rate, loss)

    monkeypatch.setattr(Engine, "step", tight)
    result = recover_locally(replace(tiny_spec, micro_batch_size=2), str(tmp_path / "a"), tmp_path / "work")
    assert len(result.steps) == 6
    assert "going on with 1" in caplog.text
