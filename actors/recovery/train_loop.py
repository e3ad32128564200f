"""The recovery loop: the same on one process and on many, without Ray.

A step's batch is one row of `batch_order`; worker r of W takes the r-th of W
equal slices of it, cut into micro-batches. Losses and gradients are means over
the whole batch, and random draws (LoRA dropout) are seeded by step and position
in the batch, so the curve depends neither on W nor on interruptions.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch import distributed as dist

from actors.artifacts import publish
from actors.contracts import Progress, RecoveryResult, RecoverySpec, StepRecord, digest
from actors.data import batch_order, load_texts, pack_blocks
from actors.errors import RequestError, WorkError
from actors.models import depth, load_source
from actors.recovery.adapters import attach_adapters, save_adapter, trainable_parameters
from actors.recovery.engine import Engine, accumulation_steps
from actors.recovery.objectives import BuildModule, find_objective
from actors.recovery.schedule import lr_at

Write = Callable[[Path], None]
"""Writes this worker's share of a checkpoint into an empty directory."""


class DivergenceError(WorkError):
    """The loss or its gradient is no longer a number; trying again would end the same."""


@dataclass(frozen=True)
class Workplace:
    """Where a worker trains: who it is among how many, and where things go.

    Attributes:
        rank, world_size: a process group of that size must exist.
        adapter_uri: where rank 0 publishes the adapter.
        save_checkpoint: (steps done, write); called by every worker at once.
        open_checkpoint: the last whole checkpoint's directory, or None.
        progress: told after every step, on rank 0.
    """

    rank: int
    world_size: int
    adapter_uri: str
    save_checkpoint: Callable[[int, Write], None]
    open_checkpoint: Callable[[], AbstractContextManager[Path | None]]
    progress: Progress


@dataclass(frozen=True)
class Run:
    """What the loop works on. `order_SB[s]` lists the sequences of step s."""

    spec: RecoverySpec
    workplace: Workplace
    adapted: PeftModel
    engine: Engine
    sequences_ST: Tensor
    order_SB: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.order_SB)

    @property
    def tokens_per_step(self) -> int:
        return self.spec.batch_size * self.spec.sequence_length


def train(spec: RecoverySpec, workplace: Workplace) -> RecoveryResult:
    """Train the adapter that `spec` asks for; every worker of the group calls this.

    Continues from the workplace's last checkpoint if there is one. The result is
    complete on every worker; `adapter` is None except on rank 0.

    Raises:
        RequestError: the request cannot be trained as it stands.
        DivergenceError: a loss or gradient is not finite.
    """
    objective = find_objective(spec.objective)
    if objective.build is None:
        return RecoveryResult(adapter=None, steps=(), tokens=0, trainable_parameters=0)
    run = _prepare(spec, workplace, objective.build)
    try:
        records = _run_steps(run, _resume(run))
        adapter = _publish_adapter(run) if workplace.rank == 0 else None
    finally:
        run.engine.close()
    return RecoveryResult(
        adapter=adapter,
        steps=tuple(records),
        tokens=run.num_steps * run.tokens_per_step,
        trainable_parameters=sum(p.numel() for p in trainable_parameters(run.adapted)),
    )


def plan_steps(spec: RecoverySpec, num_sequences: int) -> int:
    """Number of optimizer steps: `max_tokens` in whole batches.

    Data that holds fewer tokens is gone through again, in a new order each epoch.

    Raises:
        RequestError: a batch is larger than `max_tokens`, or than the data.
    """
    per_step = spec.batch_size * spec.sequence_length
    num_steps = spec.max_tokens // per_step
    if num_steps < 1:
        raise RequestError(
            f"max_tokens {spec.max_tokens} is less than one batch of {spec.batch_size} x "
            f"{spec.sequence_length} = {per_step} tokens; raise it or make the batch smaller"
        )
    if num_sequences < spec.batch_size:
        raise RequestError(
            f"the recovery data gives {num_sequences} sequences of {spec.sequence_length} tokens, fewer than "
            f"one batch of {spec.batch_size}; give more text or make batch_size or sequence_length smaller"
        )
    return num_steps


def _prepare(spec: RecoverySpec, workplace: Workplace, build: BuildModule) -> Run:
    accumulation_steps(spec, workplace.world_size)
    lr_at(0, 1, spec.learning_rate, spec.lr_schedule)
    model, tokenizer = load_source(spec.model)
    texts = load_texts(spec.data)
    sequences_ST = pack_blocks(texts, tokenizer, spec.sequence_length, max_tokens=spec.max_tokens)
    num_steps = plan_steps(spec, len(sequences_ST))
    order_SB = batch_order(len(sequences_ST), spec.batch_size, num_steps, spec.seed)
    kept = spec.model.kept(depth(model.config))
    adapted = attach_adapters(model, spec, kept)
    engine = Engine(build(adapted, spec, kept), spec, workplace.world_size)
    return Run(spec, workplace, adapted, engine, sequences_ST, order_SB)


def _resume(run: Run) -> list[StepRecord]:
    """The steps already done; weights and optimizer are brought to that point."""
    with run.workplace.open_checkpoint() as directory:
        if directory is None:
            return []
        state = run.engine.load(directory)
    return [_record_from_json(record) for record in state["steps"]]


def _run_steps(run: Run, records: list[StepRecord]) -> list[StepRecord]:
    every = max(1, run.spec.checkpoint_steps)
    for step in range(len(records), run.num_steps):
        records.append(_run_step(run, step))
        note = f"loss {records[-1].loss:.4g}"
        if run.workplace.rank == 0:
            run.workplace.progress(step + 1, run.num_steps, note)
        if (step + 1) % every == 0 or step + 1 == run.num_steps:
            state = {"steps": [asdict(record) for record in records]}
            run.workplace.save_checkpoint(step + 1, lambda path, state=state: run.engine.save(path, state))
    return records


def _run_step(run: Run, step: int) -> StepRecord:
    """One optimizer step; nothing is changed if the loss is not finite."""
    started, spec = time.perf_counter(), run.spec
    learning_rate = lr_at(step, run.num_steps, spec.learning_rate, spec.lr_schedule, spec.warmup_steps)
    positions = list(_micro_batches(spec, run.workplace))
    sums: dict[str, Tensor] = {}
    grad_norm: float | None = None
    for count, position in enumerate(positions, start=1):
        torch.manual_seed(_draw_seed(spec.seed, step, position))
        chosen = run.order_SB[step, position : position + spec.micro_batch_size]
        terms = run.engine.backward(run.sequences_ST[chosen])
        sums = {name: sums.get(name, 0.0) + value.double() for name, value in terms.items()}
        if count == len(positions):
            terms_mean = _mean_over_workers(sums, len(positions) * run.workplace.world_size)
            _check_finite(run, step, terms_mean)
            grad_norm = run.engine.gradient_norm()
        run.engine.finish_micro_batch(learning_rate)
    grad_norm = run.engine.gradient_norm() if grad_norm is None else grad_norm
    ...
