"""The recovery loop: the same on one process and on many, without Ray.

A step's batch is one row of `batch_order`; worker r of W takes the r-th of W
equal slices of it, cut into micro-batches. Losses and gradients are means over
the whole batch, and random draws (LoRA dropout) are seeded by step and position
in the batch, so the curve depends neither on W nor on interruptions.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from actors.artifacts import publish
from actors.contracts import ArtifactRef, Progress, RecoveryResult, RecoverySpec, StepRecord, digest
from actors.data import BlockData, TrainingData, batch_order, load_texts, pack_blocks
from actors.errors import IterabreError, RequestError, WorkError
from actors.models import load_tokenizer, save_weights
from actors.recovery.adapters import stage_seed, trainable_parameters
from actors.recovery.bridge import Solution
from actors.recovery.check import check_recovery
from actors.recovery.engine import Engine
from actors.recovery.objectives import BuildModule, Solve, find_objective
from actors.recovery.pair import Pair, load_pair, save_trained
from actors.recovery.schedule import lr_at

Write = Callable[[Path], None]
"""Writes this worker's share of a checkpoint into an empty directory."""


T = TypeVar("T")


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
    pair: Pair
    engine: Engine
    data: TrainingData
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
    complete on every worker; `artifact` is None except on rank 0.

    Raises:
        RequestError: the request cannot be trained as it stands.
        DivergenceError: a loss or gradient is not finite.
    """
    objective = find_objective(spec.objective)
    if objective.solve is not None:
        return _solve(spec, workplace, objective.solve)
    if objective.build is None:
        return RecoveryResult(artifact=None, steps=(), tokens=0, trainable_parameters=0)
    run = _prepare(spec, workplace, objective.build)
    try:
        records = _run_steps(run, _resume(run))
        artifact = _publish_adapter(run) if workplace.rank == 0 else None
    finally:
        run.engine.close()
    return RecoveryResult(
        artifact=artifact,
        steps=tuple(records),
        tokens=run.num_steps * run.tokens_per_step,
        trainable_parameters=sum(p.numel() for p in trainable_parameters(run.pair.student)),
    )


def _solve(spec: RecoverySpec, workplace: Workplace, solve: Solve) -> RecoveryResult:
    """Recovery in closed form; nothing is trained."""

    def work() -> Solution:
        tokenizer = load_tokenizer(spec.model.source)
        blocks_ST = pack_blocks(load_texts(spec.data), tokenizer, spec.sequence_length)
        return solve(spec, BlockData(blocks_ST))

    solution = _all_or_none(work)
    artifact = None
    if workplace.rank == 0:
        with TemporaryDirectory(prefix="iterabre-weights-") as scratch:
            save_weights(solution.tensors, Path(scratch))
            artifact = publish(Path(scratch), workplace.adapter_uri)
    return RecoveryResult(artifact, steps=(), tokens=solution.tokens, trainable_parameters=0)


def plan_steps(spec: RecoverySpec, num_sequences: int) -> int:
    """Number of optimizer steps: `max_tokens` in whole batches.

    The batches are drawn from all of the data. If it holds fewer tokens than
    `max_tokens`, it is gone through again, in a new order each epoch.

    Raises:
        RequestError: the data holds less than one batch.
    """
    if num_sequences < spec.batch_size:
        raise RequestError(
            f"the recovery data gives {num_sequences} sequences of {spec.sequence_length} tokens, fewer than "
            f"one batch of {spec.batch_size}; give more text or make batch_size or sequence_length smaller"
        )
    return spec.max_tokens // (spec.batch_size * spec.sequence_length)


def _prepare(spec: RecoverySpec, workplace: Workplace, build: BuildModule) -> Run:
    loaded = _all_or_none(lambda: _load(spec, workplace.world_size, build))
    engine = Engine(loaded.module, spec, workplace.world_size)
    return Run(spec, workplace, loaded.pair, engine, loaded.data, loaded.order_SB)


@dataclass(frozen=True)
class _Loaded:
    pair: Pair
    module: nn.Module
    data: TrainingData
    order_SB: Tensor


def _load(spec: RecoverySpec, world_size: int, build: BuildModule) -> _Loaded:
    """Everything that can be wrong with the request is found here, cheapest first."""
    check_recovery(spec, world_size)
    texts = load_texts(spec.data)
    pair, tokenizer = load_pair(spec)
    data = BlockData(pack_blocks(texts, tokenizer, spec.sequence_length))
    num_steps = plan_steps(spec, len(data))
    order_SB = batch_order(len(data), spec.batch_size, num_steps, stage_seed(spec))
    return _Loaded(pair, build(pair, spec), data, order_SB)


def _all_or_none(work: Callable[[], T]) -> T:
    """The worker's own result of `work`, unless it failed on any worker: then all raise that error.

    Otherwise the others would wait in their next collective for one that is gone.
    """
    done, failed = None, None
    try:
        done = work()
    except IterabreError as error:
        failed = error
    failures: list[IterabreError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failed)
    for failure in failures:
        if failure is not None:
            raise failure
    return cast(T, done)


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
            run.workplace.save_checkpoint(step + 1, partial(run.engine.save, state=state))
    return records


def _run_step(run: Run, step: int) -> StepRecord:
    """One optimizer step; nothing is changed if the loss is not finite."""
    started, spec = time.perf_counter(), run.spec
    positions = _micro_batches(spec, run.workplace)
    in_step = run.data.num_tokens(run.order_SB[step])
    denominator = in_step / (len(positions) * run.workplace.world_size)
    sums: dict[str, Tensor] = {}
    for position in positions:
        torch.manual_seed(_draw_seed(stage_seed(spec), step, position))
        chosen = run.order_SB[step, position : position + spec.micro_batch_size]
        batch = replace(run.data.batch(chosen), denominator=denominator)
        for name, value in run.engine.accumulate(batch).items():
            sums[name] = sums[name] + value if name in sums else value
    means = run.engine.mean_over_workers(torch.stack(list(sums.values())).double() / len(positions))
    terms = dict(zip(sums, means, strict=True))
    _check_finite(run, step, "loss", sum(means))
    learning_rate = lr_at(step, run.num_steps, spec.learning_rate, spec.lr_schedule, spec.warmup_steps)
    grad_norm = run.engine.apply(learning_rate)
    _check_finite(run, step, "gradient", grad_norm)
    return StepRecord(
        step=step,
        tokens=in_step,
        loss=terms.pop("loss"),
        terms=tuple(terms.items()),
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        seconds=time.perf_counter() - started,
    )


def _micro_batches(spec: RecoverySpec, workplace: Workplace) -> range:
    """Positions in the step's batch at which this worker's micro-batches start."""
    share = spec.batch_size // workplace.world_size
    return range(workplace.rank * share, (workplace.rank + 1) * share, spec.micro_batch_size)


def _draw_seed(seed: int, step: int, position: int) -> int:
    return int(digest([seed, step, position])[:15], 16)


def _check_finite(run: Run, step: int, what: str, value: float) -> None:
    if math.isfinite(value):
        return
    every = max(1, run.spec.checkpoint_steps)
    good = step // every * every
    kept = f"the last good checkpoint is after step {good}" if good else "there was no checkpoint yet"
    raise DivergenceError(
        f"recovery of {run.spec.model.source.path!r} diverged: the {what} of step {step + 1} "
        f"of {run.num_steps} is {value}, on sequences {run.order_SB[step].tolist()}; {kept}. "
        "Lower the learning rate or max_grad_norm, lengthen the warm-up, or use float32"
    )


def _publish_adapter(run: Run) -> ArtifactRef:
    with TemporaryDirectory(prefix="iterabre-adapter-") as scratch:
        save_trained(run.pair, Path(scratch))
        return publish(Path(scratch), run.workplace.adapter_uri)


def _record_from_json(record: dict[str, Any]) -> StepRecord:
    return StepRecord(**{**record, "terms": tuple((name, value) for name, value in record["terms"])})
