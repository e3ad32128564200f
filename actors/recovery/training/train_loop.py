"""The recovery loop: the same on one process and on many, without Ray.

A step's batch is one row of `batch_order`; worker r of W takes the r-th of W
equal slices of it, cut into micro-batches. Losses and gradients are means over
the whole batch, and random draws (LoRA dropout) are seeded by step and position
in the batch, so the curve depends neither on W nor on interruptions: there is
no random state and no position in the data to be kept besides the step's number.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import torch
from torch import LongTensor, Tensor, nn
from torch import distributed as dist

from actors.artifacts import publish
from actors.contracts import ArtifactRef, RecoveryResult, RecoverySpec, RowCounts, StepRecord, digest
from actors.data import TrainingData
from actors.errors import IterabreError, MemoryExhaustedError, RequestError, StopRequestedError
from actors.models import LayerwisePass, load_tokenizer, save_weights
from actors.recovery.adapters.lora import stage_seed
from actors.recovery.check import check_recovery
from actors.recovery.distillation.linear_bridge import Solution
from actors.recovery.distillation.teacher_student import TeacherStudent, load_teacher_student, save_trained
from actors.recovery.objectives import BuildModule, Solve, find_objective
from actors.recovery.training.checkpoint import CorruptCheckpointError, read_state
from actors.recovery.training.deepspeed_config import largest_micro_batch, precision_of, settings_fingerprint
from actors.recovery.training.document_isolation import set_attention, wants_one_row
from actors.recovery.training.engine import Engine, peak_memory_bytes
from actors.recovery.training.failures import DivergenceError, MicroBatchError
from actors.recovery.training.lr_schedule import lr_at
from actors.recovery.training.train_context import TrainContext
from actors.recovery.training.training_data import check_vocabulary, training_data, training_order

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass
class TrainingRun:
    """The state of a training run. `order_SB[s]` lists the sequences of step s.

    `micro_batch_size` falls when memory does not suffice; nothing else changes.
    """

    spec: RecoverySpec
    context: TrainContext
    pair: TeacherStudent
    engine: Engine
    data: TrainingData
    order_SB: Tensor
    micro_batch_size: int
    checkpoints: list[int] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return len(self.order_SB)

    @property
    def local_batch_size(self) -> int:
        """Sequences of a step that one worker takes."""
        return self.spec.batch_size // self.context.world_size


def train(spec: RecoverySpec, context: TrainContext) -> RecoveryResult:
    """Train as `spec` requests; every worker of the group must call this.

    Continues from the last intact checkpoint if there is one. The result
    is complete on every worker; `artifact` is None except on rank 0.

    Raises:
        RequestError: the request cannot be trained as it stands.
        DivergenceError: a loss or gradient is not finite.
        StopRequestedError: it was asked to stop; the last step is in a checkpoint.
        MicroBatchError: call again, with as many workers, to go on with smaller micro-batches.
        MemoryExhaustedError: memory does not suffice for a single sequence.
        WorkError: the disk does not suffice for a checkpoint.
    """
    objective = find_objective(spec.objective)
    if objective.solve is not None:
        return _solve(spec, context, objective.solve)
    if objective.build is None:
        return RecoveryResult(artifact=None, steps=(), tokens=0, trainable_parameters=0)
    run = _prepare(spec, context, objective.build)
    try:
        records = _run_steps(run, _resume(run))
        with run.engine.gathered():
            artifact = _publish_from_rank_0(context, partial(save_trained, run.pair))
    finally:
        run.engine.close()
    return RecoveryResult(
        artifact=artifact,
        steps=tuple(records),
        tokens=sum(record.tokens for record in records),
        trainable_parameters=run.engine.num_trainable,
        rows=run.data.rows,
    )


def _solve(spec: RecoverySpec, context: TrainContext, solve: Solve) -> RecoveryResult:
    """Recover in closed form; nothing is trained."""

    def work() -> tuple[Solution, RowCounts]:
        check_recovery(spec, context.world_size)
        data = training_data(spec, load_tokenizer(spec.model.source))
        return solve(spec, data), data.rows

    solution, rows = _run_on_all_workers(work)
    artifact = _publish_from_rank_0(context, partial(save_weights, solution.tensors))
    return RecoveryResult(artifact, steps=(), tokens=solution.tokens, trainable_parameters=0, rows=rows)


def _publish_from_rank_0(context: TrainContext, save: Callable[[Path], None]) -> ArtifactRef | None:
    """Publish the directory that `save` writes, on rank 0."""
    if context.rank != 0:
        return None
    with TemporaryDirectory(prefix="iterabre-trained-") as scratch:
        save(Path(scratch))
        return publish(Path(scratch), context.adapter_uri)


def _prepare(spec: RecoverySpec, context: TrainContext, build: BuildModule) -> TrainingRun:
    """Load data and models; all that can be wrong with the request is found here, cheapest first."""

    def load() -> tuple[TeacherStudent, nn.Module, TrainingData, LongTensor, int]:
        check_recovery(spec, context.world_size)
        data = training_data(spec, load_tokenizer(spec.model.source))
        order_SB = training_order(spec, data, stage_seed(spec))
        has_teacher = find_objective(spec.objective).has_teacher
        pair, _ = load_teacher_student(_with_compute_dtype(spec), has_teacher)
        check_vocabulary(data, pair.student)
        if spec.attention_implementation is not None:
            for model in filter(None, (pair.student, pair.teacher)):
                set_attention(model, spec.attention_implementation)
        module = build(pair, spec)
        # The first pass records what this family's blocks return and is aborted, which must not
        # happen with sharded weights.
        for model in filter(None, (pair.student, pair.teacher)):
            LayerwisePass(model, torch.zeros(1, 1, dtype=torch.long, device=model.device))
        hint = context.micro_batch_hint() or spec.micro_batch_size
        return pair, module, data, order_SB, largest_micro_batch(spec.batch_size // context.world_size, hint)

    pair, module, data, order_SB, micro_batch_size = _run_on_all_workers(load)
    micro_batch_size = min(_all_gather(micro_batch_size))
    engine = Engine(module, spec, context.world_size, micro_batch_size)
    return TrainingRun(spec, context, pair, engine, data, order_SB, micro_batch_size)


def _with_compute_dtype(spec: RecoverySpec) -> RecoverySpec:
    """Return `spec` with its models loaded in the dtype of the computation.

    Weights that are trained are kept in float32 by the engine, so full fine-tuning
    starts from them as they are.
    """
    if spec.adapter.kind == "full":
        return spec
    source = replace(spec.model.source, dtype=precision_of(spec))
    teacher = spec.teacher and replace(spec.teacher, dtype=precision_of(spec))
    return replace(spec, model=replace(spec.model, source=source), teacher=teacher)


def _run_on_all_workers(work: Callable[[], T]) -> T:
    """Return this worker's result of `work`, unless it failed on any worker: then all raise that error.

    Otherwise the others would wait in their next collective for one that has ended.
    """
    done, failed = None, None
    try:
        done = work()
    except IterabreError as error:
        failed = error
    for failure in _all_gather(failed):
        if failure is not None:
            raise failure
    return cast(T, done)


def _all_gather(value: T) -> list[T]:
    """Return every worker's value, in the order of ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _resume(run: TrainingRun) -> list[StepRecord]:
    """Restore weights and optimizer from the last intact checkpoint, and return the steps done.

    A damaged checkpoint is passed over, by all workers together, for the one before it.
    """
    for checkpoint in run.context.checkpoints():
        with checkpoint as directory:
            try:
                _run_on_all_workers(lambda: read_state(directory))
            except CorruptCheckpointError as error:
                log.warning("%s; going back to the checkpoint before it", error)
                continue
            state = run.engine.load(directory)
        if state["settings"] != settings_fingerprint(run.spec):
            raise RequestError(
                f"the checkpoints of {run.context.adapter_uri!r} are those of a recovery with other "
                "settings; give this one a name or storage path of its own, or remove them"
            )
        run.checkpoints.append(len(state["steps"]))
        return [
            StepRecord(**{**record, "terms": tuple((name, value) for name, value in record["terms"])})
            for record in state["steps"]
        ]
    return []


def _run_steps(run: TrainingRun, records: list[StepRecord]) -> list[StepRecord]:
    every, left = max(1, run.spec.checkpoint_steps), False
    for step in range(len(records), run.num_steps):
        records.append(_run_step(run, step))
        if run.context.rank == 0:
            run.context.progress(step + 1, run.num_steps, f"loss {records[-1].loss:.4g}")
        preemption_requested = run.context.preemption_requested()
        stops = _stops(run) and step + 1 < run.num_steps
        due = (step + 1) % every == 0 or step + 1 == run.num_steps
        if due or stops or (preemption_requested and not left):
            state = {
                "settings": settings_fingerprint(run.spec),
                "steps": [asdict(record) for record in records],
            }
            run.context.save_checkpoint(step + 1, partial(run.engine.save, state=state))
            run.checkpoints.append(step + 1)
        if stops:
            raise StopRequestedError(
                f"the recovery of {run.spec.model.source.path!r} stopped on request after step {step + 1} of "
                f"{run.num_steps}, where its checkpoint is"
            )
        left = preemption_requested
    return records


def _stops(run: TrainingRun) -> bool:
    """Return whether the training is to end here; the same on all workers, of which rank 0 is told."""
    requested = run.context.rank == 0 and run.context.stop_requested()
    return run.engine.max_over_workers(requested) > 0


def _run_step(run: TrainingRun, step: int) -> StepRecord:
    """Run one optimizer step; nothing is changed if the loss or its gradient is not finite.

    A gradient that overflows float16 is computed again with a smaller loss scale.
    """
    started, spec, overflows = time.perf_counter(), run.spec, 0
    learning_rate = lr_at(step, run.num_steps, spec.learning_rate, spec.lr_schedule, spec.warmup_steps)
    while True:
        terms = _accumulate(run, step)
        _check_finite(run, step, "loss", sum(terms.values()))
        scale = run.engine.loss_scale.value
        grad_norm = run.engine.step(learning_rate)
        if math.isfinite(grad_norm) or not run.engine.loss_scale.can_decrease:
            break
        run.engine.loss_scale.decrease()
        overflows += 1
        log.warning("step %d: the gradient overflowed at loss scale %g; computed again", step + 1, scale)
    _check_finite(run, step, "gradient", grad_norm)
    return StepRecord(
        step=step,
        tokens=int(run.data.lengths_S[run.order_SB[step]].sum()),
        loss=terms.pop("loss"),
        terms=tuple(terms.items()),
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=run.engine.max_over_workers(peak_memory_bytes()),
        loss_scale=scale,
        overflows=overflows,
    )


def _accumulate(run: TrainingRun, step: int) -> dict[str, float]:
    """Return the loss terms of one batch, whose gradient is left in the engine.

    If memory does not suffice on any worker, all begin the step again with
    micro-batches of half the size.
    """
    while True:
        sums, fits = None, True
        try:
            sums = _accumulate_micro_batches(run, step)
        except torch.OutOfMemoryError as error:
            fits, said = False, str(error)
        if not fits and not run.engine.backward_is_local:
            # The others wait for this worker inside the backward pass: only a restart of all can follow.
            raise MicroBatchError(f"{_halve_micro_batch(run, step)}: {said}")
        if run.engine.max_over_workers(not fits) == 0 and sums is not None:
            means = run.engine.mean_over_workers(torch.stack(list(sums.values())).double())
            return dict(zip(sums, means, strict=True))
        sums = None
        log.warning("%s; the step begins again", _halve_micro_batch(run, step))
        run.engine.reinitialize(run.micro_batch_size)


def _halve_micro_batch(run: TrainingRun, step: int) -> str:
    """Halve the micro-batch, for this run and for later tries, and return the message for the log.

    Raises:
        MemoryExhaustedError: there is nothing left to halve.
    """
    before = run.micro_batch_size
    if before == 1:
        raise MemoryExhaustedError(
            f"step {step + 1} of the recovery of {run.spec.model.source.path!r} does not fit into memory "
            f"even with micro-batches of one sequence of {run.spec.sequence_length} tokens; make "
            "sequence_length smaller, set recovery.gradient_checkpointing, shard or offload "
            "(configs/deepspeed/zero3_offload.json), or use a device with more memory. "
            f"{_last_checkpoint(run)}; --resume continues"
        )
    run.micro_batch_size = largest_micro_batch(run.local_batch_size, before // 2)
    run.context.save_micro_batch_hint(run.micro_batch_size)
    return (
        f"step {step + 1}: out of memory with micro-batches of {before}; going on with "
        f"{run.micro_batch_size} x {run.local_batch_size // run.micro_batch_size} accumulated, the batch "
        f"stays {run.spec.batch_size}"
    )


def _accumulate_micro_batches(run: TrainingRun, step: int) -> dict[str, Tensor]:
    """Return the mean of each loss term over this worker's micro-batches."""
    size, first = run.micro_batch_size, run.context.rank * run.local_batch_size
    positions = range(first, first + run.local_batch_size, size)
    denominator = run.data.num_tokens(run.order_SB[step]) / (len(positions) * run.context.world_size)
    sums: dict[str, Tensor] = {}
    for position in positions:
        # Dropout is drawn anew for each micro-batch, whatever was drawn before it.
        torch.manual_seed(int(digest([stage_seed(run.spec), step, position])[:15], 16))
        chosen_B = run.order_SB[step, position : position + size]
        batch = replace(run.data.batch(chosen_B), denominator=denominator)
        if batch.position_ids_BT is not None and wants_one_row(run.pair.student):
            batch = batch.one_row()
        for name, value in run.engine.accumulate(batch, last=position == positions[-1]).items():
            sums[name] = sums.get(name, 0.0) + value / len(positions)
    return sums


def _check_finite(run: TrainingRun, step: int, what: str, value: float) -> None:
    if math.isfinite(value):
        return
    raise DivergenceError(
        f"recovery of {run.spec.model.source.path!r} diverged: the {what} of step {step + 1} "
        f"of {run.num_steps} is {value}, on sequences {run.order_SB[step].tolist()}; "
        f"{_last_checkpoint(run)}. Lower the learning rate or max_grad_norm, lengthen the warm-up, "
        "or use float32"
    )


def _last_checkpoint(run: TrainingRun) -> str:
    good = run.checkpoints[-1] if run.checkpoints else 0
    return f"the last good checkpoint is after step {good}" if good else "there was no checkpoint yet"
