"""What happens when a worker dies, memory or disk run out, or a checkpoint is damaged."""

import logging
import os
import random
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn

from actors.contracts import RecoveryResult, RecoverySpec
from actors.data import TokenBatch
from actors.errors import RequestError, WorkError
from actors.recovery import objectives
from actors.recovery.distillation.student import Student
from actors.recovery.distillation.teacher_student import TeacherStudent
from actors.recovery.objectives import OBJECTIVES, Objective, build_lockstep
from actors.recovery.training.checkpoint import CheckpointDirectory, CorruptCheckpointError, read_state
from actors.recovery.training.engine import single_process_group
from actors.recovery.training.local import recover_locally
from actors.recovery.training.train_context import MemoryUse
from actors.recovery.training.train_loop import MicroBatchError, train
from tests.support.gloo_group import group_train_context, result_of, run_group, train_all
from tests.unit.recovery.test_engine import CONFIGS, assert_same_curve


@pytest.fixture(scope="module")
def spec(tiny_spec: RecoverySpec) -> RecoverySpec:
    """Six steps of four sequences in micro-batches of two; no dropout, as that follows the micro-batches."""
    return replace(tiny_spec, micro_batch_size=2, adapter=replace(tiny_spec.adapter, dropout=0.0))


@pytest.fixture(scope="module")
def undisturbed(spec: RecoverySpec, tmp_path_factory: pytest.TempPathFactory) -> RecoveryResult:
    directory = tmp_path_factory.mktemp("undisturbed")
    return recover_locally(spec, str(directory / "adapter"), directory / "work")


# Death of a worker


def _killed_at(
    rank: int, world: int, step: int, during_checkpoint: bool, spec: RecoverySpec, out: Path
) -> None:
    """Train as worker `rank`; worker 1 kills itself after that step, or with its share half written."""
    context = group_train_context(rank, world, out)

    def die() -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def save(steps_done: int, write: Callable[[Path], None]) -> None:
        def write_and_die(directory: Path) -> None:
            write(directory)
            if during_checkpoint and steps_done == step:
                next(directory.glob("part-1-*")).write_bytes(b"half")
                die()

        context.save_checkpoint(steps_done, write_and_die)

    seen: list[int] = []

    def preemption_requested() -> bool:
        seen.append(1)
        if not during_checkpoint and len(seen) == step:
            die()
        return False

    train(spec, replace(context, save_checkpoint=save, preemption_requested=preemption_requested))


@pytest.mark.parametrize("during_checkpoint", [False, True], ids=["at a step", "during a checkpoint"])
def test_a_killed_worker_changes_nothing(
    spec: RecoverySpec, undisturbed: RecoveryResult, tmp_path: Path, during_checkpoint: bool
) -> None:
    sharded = replace(spec, deepspeed=CONFIGS["zero2"], checkpoint_steps=2)
    step = 4 if during_checkpoint else random.choice([3, 4, 5])
    # The one that lives on may be heard of first: it has lost its peer.
    ended = (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException)
    with pytest.raises(ended, match=r"SIGKILL|peer"):
        run_group(2, tmp_path / "first", _killed_at, step, during_checkpoint, sharded, tmp_path)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    # It dies after the step and before the step's checkpoint is in place.
    assert kept[-1] == ("step_000004" if step == 5 else "step_000002")
    # The one that goes on may be another number of workers.
    with single_process_group():
        train_all(0, 1, [(sharded, tmp_path)])
    assert_same_curve(result_of(tmp_path), undisturbed)


# Damaged checkpoints and a full disk


class _Interrupted(Exception):
    """Stands for the death of the process."""


def _interrupt_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, note: str = "") -> None:
        if done == step:
            raise _Interrupted

    return progress


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_flip_a_byte, Path.unlink])
@pytest.mark.parametrize("file", ["part-0-of-1.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    spec: RecoverySpec,
    undisturbed: RecoveryResult,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    file: str,
    damage: Callable[[Path], None],
) -> None:
    with pytest.raises(_Interrupted):
        recover_locally(spec, str(tmp_path / "a"), tmp_path / "work", _interrupt_at(5))
    (newest,) = tmp_path.glob("work/*/step_000004")
    damage(newest / file)
    with pytest.raises(CorruptCheckpointError, match=file):
        read_state(newest)
    seen: list[int] = []
    resumed = recover_locally(
        spec, str(tmp_path / "a"), tmp_path / "work", lambda done, *_: seen.append(done)
    )
    assert seen == [3, 4, 5, 6]
    assert any(file in record.message and record.levelno == logging.WARNING for record in caplog.records)
    assert_same_curve(resumed, undisturbed)


def test_a_full_disk_is_named_and_the_last_good_checkpoint_stays(
    spec: RecoverySpec, undisturbed: RecoveryResult, tmp_path: Path
) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit_file_size(done: int, total: int, note: str = "") -> None:
        if done == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))

    try:
        with pytest.raises(
            WorkError, match=r"cannot write a checkpoint of \d{4,} bytes into .*work.*--resume"
        ):
            recover_locally(spec, str(tmp_path / "a"), tmp_path / "work", limit_file_size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    (kept,) = tmp_path.glob("work/*/*step_*")
    assert kept.name == "step_000002"
    assert read_state(kept)["steps"][-1]["step"] == 1
    assert not list(tmp_path.glob("work/*/.writing-*"))
    assert_same_curve(recover_locally(spec, str(tmp_path / "a"), tmp_path / "work"), undisturbed)


def test_checkpoints_of_other_settings_are_not_continued(spec: RecoverySpec, tmp_path: Path) -> None:
    with single_process_group():
        train(spec, group_train_context(0, 1, tmp_path))
        with pytest.raises(RequestError, match=r"other settings.*name or storage path"):
            train(replace(spec, learning_rate=1.0), group_train_context(0, 1, tmp_path))
        # A run that had already ended is not made again: its last checkpoint is what it ended with.
        again = train(replace(spec, micro_batch_size=1), group_train_context(0, 1, tmp_path))
    assert len(again.steps) == 6


def test_only_the_last_checkpoints_are_kept_and_a_broken_write_leaves_none(tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(tmp_path / "c")

    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise _Interrupted

    for step in (1, 2, 3):
        checkpoints.save(step, lambda directory: (directory / "whole").touch())
    with pytest.raises(_Interrupted):
        checkpoints.save(4, fail)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step_000002", "step_000003"]


def test_a_machine_that_is_about_to_go_leaves_a_checkpoint_once(spec: RecoverySpec, tmp_path: Path) -> None:
    context, reported = group_train_context(0, 1, tmp_path), iter([False, False, True, True, True, True])
    saved: list[int] = []
    context = replace(
        context,
        save_checkpoint=lambda done, write: saved.append(done),
        preemption_requested=lambda: next(reported),
    )
    with single_process_group():
        train(replace(spec, checkpoint_steps=100), context)
    assert saved == [3, 6]


# Memory


class _Tight(nn.Module):
    """A training module that fits `capacity` sequences at a time, as a full GPU would.

    It fails in the second micro-batch of a step or later, after gradients were accumulated.
    """

    def __init__(self, inner: nn.Module, capacity: int, in_backward: bool):
        super().__init__()
        self.inner, self.capacity, self.in_backward, self.calls = inner, capacity, in_backward, 0

    def forward(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        self.calls += 1
        terms = self.inner(batch)
        if len(batch.input_ids_BT) <= self.capacity or self.calls < 4:
            return terms
        if not self.in_backward:
            self._fail()
        terms["loss"].register_hook(self._fail)
        return terms

    def _fail(self, *_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _make_tight(monkeypatch: pytest.MonkeyPatch, capacity: int, in_backward: bool = False) -> None:
    def build(pair: TeacherStudent, spec: RecoverySpec) -> nn.Module:
        return _Tight(build_lockstep(pair, spec), capacity, in_backward)

    monkeypatch.setitem(
        objectives.OBJECTIVES, "kd", Objective(build, "a GPU that is too small", has_teacher=True)
    )


@pytest.mark.parametrize(
    ("name", "in_backward"),
    [
        ("zero0", False),
        ("zero0", True),
        ("zero1", True),
        ("zero2", True),
        pytest.param("zero3", False, marks=pytest.mark.long),
    ],
)
def test_micro_batches_that_do_not_fit_are_halved_and_the_step_is_made_again(
    spec: RecoverySpec,
    undisturbed: RecoveryResult,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    in_backward: bool,
) -> None:
    _make_tight(monkeypatch, 1, in_backward)
    sharded = replace(spec, deepspeed=CONFIGS[name])
    seen: list[int] = []
    result = recover_locally(sharded, str(tmp_path / "a"), tmp_path / "w", lambda done, *_: seen.append(done))
    assert_same_curve(result, undisturbed)
    assert [
        r.message
        for r in caplog.records
        if "out of memory with micro-batches of 2; going on with 1" in r.message
    ]
    # Stage 3 cannot leave a broken pass; it goes on from the last checkpoint, here from the start.
    assert seen == ([1, 1, 2, 3, 4, 5, 6] if name == "zero3" else [1, 2, 3, 4, 5, 6])


def test_memory_that_does_not_suffice_for_one_sequence_ends_with_the_remedy(
    spec: RecoverySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make_tight(monkeypatch, 0)
    with pytest.raises(
        WorkError, match=r"step 2 .*one sequence of 16 tokens.*gradient_checkpointing.*no checkpoint"
    ):
        recover_locally(spec, str(tmp_path / "a"), tmp_path / "work")


def _second_is_tight(rank: int, world: int, spec: RecoverySpec, out: Path) -> None:
    capacity = 1 if rank == 1 else 99
    OBJECTIVES["kd"] = Objective(
        lambda pair, spec: _Tight(build_lockstep(pair, spec), capacity, True), "", has_teacher=True
    )
    try:
        train_all(rank, world, [(spec, out)])
    except MicroBatchError:
        assert spec.deepspeed == CONFIGS["zero2"]
        raise


@pytest.mark.parametrize("name", ["zero1", pytest.param("zero2", marks=pytest.mark.long)])
def test_workers_agree_on_a_smaller_micro_batch(
    spec: RecoverySpec, undisturbed: RecoveryResult, tmp_path: Path, name: str
) -> None:
    # One worker's share of the batch is two sequences: it fails in the fourth step.
    sharded = replace(spec, deepspeed=CONFIGS[name])
    if name == "zero2":
        with pytest.raises(multiprocessing.ProcessRaisedException, match=r"MicroBatchError|peer"):
            run_group(2, tmp_path / "first", _second_is_tight, sharded, tmp_path)
    assert (tmp_path / "micro_batch_size").exists() == (name == "zero2")
    run_group(2, tmp_path / "group", _second_is_tight, sharded, tmp_path)
    assert (tmp_path / "micro_batch_size").read_text() == "1"
    assert_same_curve(result_of(tmp_path), undisturbed)


class _TightStudent(Student):
    """A student that fits only once half of its blocks are computed again."""

    def forward(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        if self.checkpointed < 0.5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        loss = self.hidden(batch).pow(4).mean()
        return {"loss": loss}


def test_blocks_are_computed_again_where_one_sequence_does_not_fit(
    spec: RecoverySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tight = Objective(lambda pair, spec: _TightStudent(pair, spec.gradient_checkpointing), "a small GPU")
    monkeypatch.setitem(objectives.OBJECTIVES, "healing", tight)
    healing = replace(spec, objective="healing")
    auto, on = (
        recover_locally(
            replace(healing, gradient_checkpointing=way), str(tmp_path / f"{way}"), tmp_path / "work"
        )
        for way in ("auto", True)
    )
    assert_same_curve(auto, on)
    assert "going on with 1 x 4 accumulated and 50% of the blocks computed again" in caplog.text
    with pytest.raises(WorkError, match=r"set recovery\.gradient_checkpointing: auto"):
        recover_locally(healing, str(tmp_path / "off"), tmp_path / "work")


def test_memory_is_saved_by_micro_batches_first_and_the_note_of_it_is_read_back() -> None:
    use, seen = MemoryUse(4), []
    while (use := use.smaller(auto=True)) is not None:  # type: ignore[assignment]
        seen.append(str(use))
        assert MemoryUse.parse(str(use)) == use
    assert seen == ["2", "1", "1 0.25", "1 0.5", "1 0.75", "1 1"]
    assert MemoryUse(1).smaller(auto=False) is None
