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
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from actors.artifacts import publish
from actors.contracts import (
    ArtifactRef,
    RecoveryResult,
    RecoverySpec,
    RowCounts,
    StepRecord,
    digest,
    no_progress,
)
from actors.errors import MemoryExhaustedError, RequestError, StopRequestedError, one_line
from actors.models import load_tokenizer, save_weights
from actors.out_of_memory import is_out_of_memory
from actors.recovery.adapters.lora import stage_seed
from actors.recovery.check import check_recovery
from actors.recovery.distillation.linear_bridge import Solution
from actors.recovery.distillation.teacher_student import save_trained
from actors.recovery.objectives import Solve, find_objective
from actors.recovery.training.checkpoint import CorruptCheckpointError, read_state
from actors.recovery.training.deepspeed_config import precision_of, settings_fingerprint
from actors.recovery.training.engine import peak_memory_bytes, tensor_float32
from actors.recovery.training.failures import DivergenceError, MicroBatchError
from actors.recovery.training.lr_schedule import lr_at
from actors.recovery.training.pending_steps import PendingStep, read_steps
from actors.recovery.training.train_context import TrainContext
from actors.recovery.training.training_data import training_data
from actors.recovery.training.training_run import TrainingRun, prepare, run_on_all_workers
from actors.recovery.training.utilisation import FlopCounter, peak_flops

READ_INTERVAL_S = 1.0
"""Between two looks at what a GPU has computed: each makes it wait."""

log = logging.getLogger(__name__)


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
    run = prepare(spec, context, objective.build)
    try:
        with tensor_float32(precision_of(spec)):
            records = _run_steps(run, _resume(run))
        artifact = _publish(context, partial(save_trained, run.pair, gathered=run.engine.gathered))
    finally:
        run.reader.close()
        run.engine.close()
    return RecoveryResult(
        artifact=artifact,
        steps=tuple(records),
        tokens=sum(record.tokens for record in records),
        trainable_parameters=run.engine.num_trainable,
        flops_per_token=run.flops_per_token or 0.0,
        peak_flops=context.world_size * peak_flops(run.engine.device, precision_of(spec)),
        rows=run.data.rows,
    )


def _solve(spec: RecoverySpec, context: TrainContext, solve: Solve) -> RecoveryResult:
    """Recover in closed form; nothing is trained."""

    def work() -> tuple[Solution, RowCounts]:
        check_recovery(spec, context.world_size)
        data = training_data(spec, load_tokenizer(spec.model.source))
        return solve(spec, data, context.progress if context.rank == 0 else no_progress), data.rows

    solution, rows = run_on_all_workers(work)

    def save(directory: Path | None) -> None:
        if directory is not None:
            save_weights(solution.tensors, directory)

    artifact = _publish(context, save)
    return RecoveryResult(artifact, steps=(), tokens=solution.tokens, trainable_parameters=0, rows=rows)


def _publish(context: TrainContext, save: Callable[[Path | None], None]) -> ArtifactRef | None:
    """Publish the directory that `save` writes, on rank 0; the others take part without one."""
    if context.rank != 0:
        save(None)
        return None
    with TemporaryDirectory(prefix="iterabre-trained-") as scratch:
        save(Path(scratch))
        return publish(Path(scratch), context.adapter_uri)


def _resume(run: TrainingRun) -> list[StepRecord]:
    """Restore weights and optimizer from the last intact checkpoint, and return the steps done.

    A damaged checkpoint is passed over, by all workers together, for the one before it.
    """
    for checkpoint in run.context.checkpoints():
        with checkpoint as directory:
            try:
                run_on_all_workers(lambda: read_state(directory))
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
        # Where no step is left, none will count them.
        run.flops_per_token = state.get("flops_per_token")
        return [
            StepRecord(**{**record, "terms": tuple((name, value) for name, value in record["terms"])})
            for record in state["steps"]
        ]
    return []


def _run_steps(run: TrainingRun, records: list[StepRecord]) -> list[StepRecord]:
    """Make the steps that are left; their numbers are read, and operators answered, once an interval."""
    every, left, read_at = max(1, run.spec.checkpoint_steps), False, time.monotonic()
    interval_s = read_interval_s(run)
    for step in range(len(records), run.num_steps):
        run.pending.append(_run_step(run, step))
        last = step + 1 == run.num_steps
        due = (step + 1) % every == 0 or last
        # The first worker's clock decides for all.
        elapsed = run.context.rank == 0 and time.monotonic() - read_at >= interval_s
        if not (due or interval_s == 0 or run.engine.max_over_workers(elapsed)):
            continue
        records += _read_pending(run)
        read_at = time.monotonic()
        if run.context.rank == 0:
            run.context.progress(step + 1, run.num_steps, f"loss {records[-1].loss:.4g}")
        preemption_requested = run.context.preemption_requested()
        stops = _stops(run) and not last
        if due or stops or (preemption_requested and not left):
            state = {
                "settings": settings_fingerprint(run.spec),
                "steps": [asdict(record) for record in records],
                "flops_per_token": run.flops_per_token,
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


def read_interval_s(run: TrainingRun) -> float:
    """Return how long numbers stay on the device; a CPU is never waited for."""
    return 0.0 if run.engine.device.type == "cpu" else READ_INTERVAL_S


def _read_pending(run: TrainingRun) -> list[StepRecord]:
    """Return the records of the steps since the last call.

    Raises:
        DivergenceError: one is not finite. The weights are those from before it or, where steps are
            deferred, from steps after it, too; no checkpoint holds them.
    """
    records = read_steps(run.pending, run.engine.max_over_workers(peak_memory_bytes()))
    run.pending.clear()
    for record in records:
        _check_finite(run, record.step, "loss", record.loss + sum(value for _, value in record.terms))
        _check_finite(run, record.step, "gradient", record.grad_norm)
    return records


def _stops(run: TrainingRun) -> bool:
    """Return whether the training is to end here; the same on all workers, of which rank 0 is told."""
    requested = run.context.rank == 0 and run.context.stop_requested()
    return run.engine.max_over_workers(requested) > 0


def _run_step(run: TrainingRun, step: int) -> PendingStep:
    """Run one optimizer step; nothing is changed if the loss or its gradient is not finite.

    A gradient that overflows float16 is computed again with a smaller loss scale.
    """
    started, spec, overflows = time.perf_counter(), run.spec, 0
    learning_rate = lr_at(step, run.num_steps, spec.learning_rate, spec.lr_schedule, spec.warmup_steps)
    while True:
        terms = _accumulate(run, step)
        if not run.engine.steps_are_deferred:
            _check_finite(run, step, "loss", float(sum(terms.values())))
        scale = run.engine.loss_scale.value
        grad_norm = _change_weights(run, step, learning_rate, terms["loss"])
        decides = run.engine.loss_scale.can_decrease
        if not decides or math.isfinite(grad_norm):
            break
        run.engine.loss_scale.decrease()
        overflows += 1
        log.warning("step %d: the gradient overflowed at loss scale %g; computed again", step + 1, scale)
    if not run.engine.steps_are_deferred:
        _check_finite(run, step, "gradient", float(grad_norm))
    tokens = int(run.data.lengths_S[run.order_SB[step]].sum())
    return PendingStep(step, tokens, terms, grad_norm, learning_rate, scale, overflows, started)


def _change_weights(run: TrainingRun, step: int, learning_rate: float, loss: Tensor) -> Tensor:
    """Run the optimizer and return the gradient's norm.

    Raises:
        MicroBatchError: memory did not suffice, which leaves weights half changed: all go on from the
            last checkpoint, with smaller micro-batches.
    """
    try:
        return run.engine.step(learning_rate, loss)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = one_line(error)
    raise MicroBatchError(f"{_use_less_memory(run, step)}: {said}")


def _accumulate(run: TrainingRun, step: int) -> dict[str, Tensor]:
    """Return the loss terms of one batch, on the device; its gradient is left in the engine.

    If memory does not suffice on any worker, all begin the step again with less of it in use.
    """
    while True:
        sums, fits = None, True
        try:
            sums = _accumulate_micro_batches(run, step)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fits, said = False, one_line(error)
        if not fits and not run.engine.backward_is_local:
            # The others wait for this worker inside the backward pass: only a restart of all can follow.
            raise MicroBatchError(f"{_use_less_memory(run, step)}: {said}")
        if run.engine.max_over_workers(not fits) == 0 and sums is not None:
            means = run.engine.mean_over_workers(torch.stack(list(sums.values())).double())
            return dict(zip(sums, means.unbind(), strict=True))
        sums = None
        log.warning("%s; the step begins again", _use_less_memory(run, step))
        run.engine.reinitialize(run.memory_use.micro_batch_size)


def _use_less_memory(run: TrainingRun, step: int) -> str:
    """Cut the work smaller, for this run and for later tries, and return the message for the log.

    Raises:
        MemoryExhaustedError: it cannot be cut any smaller.
    """
    before, auto = run.memory_use, run.spec.gradient_checkpointing == "auto"
    use = before.smaller(auto)
    if use is None:
        remedy = "" if run.spec.gradient_checkpointing else "set recovery.gradient_checkpointing: auto, "
        raise MemoryExhaustedError(
            f"step {step + 1} of the recovery of {run.spec.model.source.path!r} does not fit into memory "
            f"even with micro-batches of one sequence of {run.spec.sequence_length} tokens; make "
            f"sequence_length smaller, {remedy}shard or offload "
            "(configs/deepspeed/zero3_offload.json), or use a device with more memory. "
            f"{_last_checkpoint(run)}; --resume continues"
        )
    run.fit_into(use)
    use = run.memory_use
    run.context.save_memory_hint(use)
    again = f" and {use.checkpointed:.0%} of the blocks computed again" if use.checkpointed else ""
    return (
        f"step {step + 1}: out of memory with micro-batches of {before.micro_batch_size}; going on with "
        f"{use.micro_batch_size} x {run.local_batch_size // use.micro_batch_size} accumulated{again}, "
        f"the batch stays {run.spec.batch_size}"
    )


def _accumulate_micro_batches(run: TrainingRun, step: int) -> dict[str, Tensor]:
    """Return the mean of each loss term over this worker's micro-batches."""
    size, first = run.memory_use.micro_batch_size, run.context.rank * run.local_batch_size
    positions = range(first, first + run.local_batch_size, size)
    denominator = run.data.num_tokens(run.order_SB[step]) / (len(positions) * run.context.world_size)
    sums: dict[str, Tensor] = {}
    for position in positions:
        # Dropout is drawn anew for each micro-batch, whatever was drawn before it.
        torch.manual_seed(int(digest([stage_seed(run.spec), step, position])[:15], 16))
        ends = position == positions[-1]
        next_step, next_position = (step + 1, first) if ends else (step, position + size)
        batch = run.reader.batch(
            run.order_SB[step, position : position + size],
            run.order_SB[next_step, next_position : next_position + size]
            if next_step < run.num_steps
            else None,
        )
        counter = FlopCounter() if run.flops_per_token is None else None
        with counter or nullcontext():
            terms = run.engine.accumulate(replace(batch, denominator=denominator), last=ends)
        if counter is not None:
            tokens = run.data.lengths_S[run.order_SB[step, position : position + size]].sum()
            run.flops_per_token = counter.flops / int(tokens)
        for name, value in terms.items():
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
