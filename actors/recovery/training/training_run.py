"""What a training needs, made ready: data, models and engine, the same on one worker and on many."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import LongTensor, Tensor, nn
from torch import distributed as dist

from actors.contracts import RecoverySpec
from actors.data import ReadAhead, TokenBatch, TrainingData, with_teacher_states
from actors.errors import IterabreError, MemoryExhaustedError, one_line
from actors.models import LayerwisePass, load_tokenizer
from actors.out_of_memory import is_out_of_memory
from actors.recovery.adapters.lora import stage_seed
from actors.recovery.check import check_recovery
from actors.recovery.distillation.student import Student
from actors.recovery.distillation.teacher_student import TeacherStudent, load_teacher_student
from actors.recovery.objectives import BuildModule, find_objective
from actors.recovery.training.deepspeed_config import largest_micro_batch, precision_of
from actors.recovery.training.document_isolation import set_attention, wants_one_row
from actors.recovery.training.engine import Engine
from actors.recovery.training.pending_steps import PendingStep
from actors.recovery.training.train_context import MemoryUse, TrainContext
from actors.recovery.training.training_data import check_vocabulary, training_data, training_order

T = TypeVar("T")


@dataclass
class TrainingRun:
    """The state of a training run. `order_SB[s]` lists the sequences of step s.

    `memory_use` falls when memory does not suffice; nothing else changes.
    """

    spec: RecoverySpec
    context: TrainContext
    pair: TeacherStudent
    module: nn.Module
    engine: Engine
    data: TrainingData
    order_SB: Tensor
    memory_use: MemoryUse
    reader: ReadAhead
    pending: list[PendingStep] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    flops_per_token: float | None = None

    def fit_into(self, use: MemoryUse) -> None:
        """Go on with that use of memory; modules of plug-ins may know no checkpointing."""
        size = largest_micro_batch(self.local_batch_size, use.micro_batch_size)
        self.memory_use = replace(use, micro_batch_size=size)
        if isinstance(self.module, Student) and self.spec.gradient_checkpointing == "auto":
            self.module.checkpointed = use.checkpointed

    @property
    def num_steps(self) -> int:
        return len(self.order_SB)

    @property
    def local_batch_size(self) -> int:
        """Sequences of a step that one worker takes."""
        return self.spec.batch_size // self.context.world_size


def prepare(spec: RecoverySpec, context: TrainContext, build: BuildModule) -> TrainingRun:
    """Load data and models; all that can be wrong with the request is found here, cheapest first."""

    def load() -> tuple[TeacherStudent, nn.Module, TrainingData, LongTensor, MemoryUse]:
        check_recovery(spec, context.world_size)
        data = training_data(spec, load_tokenizer(spec.model.source))
        if spec.teacher_states is not None:
            # A bridge or merged weights may have changed blocks below, so that other states enter there.
            block = None if spec.model.weights else spec.first_trainable
            data = with_teacher_states(data, spec.teacher_states, block)
        order_SB = training_order(spec, data, stage_seed(spec))
        has_teacher = find_objective(spec.objective).has_teacher
        pair, _ = _fitting(spec, lambda: load_teacher_student(_with_compute_dtype(spec), has_teacher))
        check_vocabulary(data, pair.student)
        if spec.attention_implementation is not None:
            for model in filter(None, (pair.student, pair.teacher)):
                set_attention(model, spec.attention_implementation)
        module = _fitting(spec, lambda: build(pair, spec))
        # The first pass records what this family's blocks return and is aborted, which must not
        # happen with sharded weights.
        for model in filter(None, (pair.student, pair.teacher)):
            LayerwisePass(model, torch.zeros(1, 1, dtype=torch.long, device=model.device))
        use = context.memory_hint() or MemoryUse(spec.micro_batch_size)
        size = largest_micro_batch(spec.batch_size // context.world_size, use.micro_batch_size)
        return pair, module, data, order_SB, replace(use, micro_batch_size=size)

    pair, module, data, order_SB, use = run_on_all_workers(load)
    use = min(all_gather(use), key=lambda each: (each.micro_batch_size, -each.checkpointed))
    engine = run_on_all_workers(
        lambda: _fitting(spec, lambda: Engine(module, spec, context.world_size, use.micro_batch_size))
    )
    one_row = wants_one_row(pair.student)

    def read(chosen_B: LongTensor) -> TokenBatch:
        batch = data.batch(chosen_B)
        return batch.one_row() if one_row and batch.position_ids_BT is not None else batch

    reader = ReadAhead(read, pin=engine.device.type == "cuda")
    run = TrainingRun(spec, context, pair, module, engine, data, order_SB, use, reader)
    run.fit_into(use)
    return run


def _fitting(spec: RecoverySpec, load: Callable[[], T]) -> T:
    """Return what `load` gives.

    Raises:
        MemoryExhaustedError: memory does not suffice for the models, whatever the micro-batch.
    """
    try:
        return load()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = one_line(error)
    raise MemoryExhaustedError(
        f"the models that the recovery of {spec.model.source.path!r} trains do not fit into memory ({said}); "
        "shard them over more workers (configs/deepspeed/zero3.json), offload them (zero3_offload.json), "
        "take recovery.adapter.kind: qlora, or use a device with more memory"
    )


def _with_compute_dtype(spec: RecoverySpec) -> RecoverySpec:
    """Return `spec` with its models loaded in the dtype of the computation.

    Weights that are trained are kept in float32 by the engine, so full fine-tuning
    starts from them as they are; so does DoRA, which is merged into them.
    """
    if spec.adapter.leaves_weights:
        return spec
    source = replace(spec.model.source, dtype=precision_of(spec))
    teacher = spec.teacher and replace(spec.teacher, dtype=precision_of(spec))
    return replace(spec, model=replace(spec.model, source=source), teacher=teacher)


def run_on_all_workers(work: Callable[[], T]) -> T:
    """Return this worker's result of `work`, unless it failed on any worker: then all raise that error.

    Otherwise the others would wait in their next collective for one that has ended.
    """
    done, failed = None, None
    try:
        done = work()
    except IterabreError as error:
        failed = error
    for failure in all_gather(failed):
        if failure is not None:
            raise failure
    return cast(T, done)


def all_gather(value: T) -> list[T]:
    """Return every worker's value, in the order of ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
