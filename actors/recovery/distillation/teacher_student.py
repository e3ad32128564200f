"""The student, and the teacher that it learns from."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.contracts import RecoverySpec
from actors.errors import RequestError
from actors.models import build_model, depth, device, find_layers, load_source, open_model
from actors.models.model_builder import rename_layers
from actors.models.weights import save_weights_as_read
from actors.recovery.adapters.lora import (
    CURRENT,
    attach_adapters,
    check_adapter,
    new_adapter,
    save_adapter,
)
from actors.recovery.adapters.weight_deltas import can_share_weights
from actors.recovery.training.deepspeed_config import zero_stage

Gathered = Callable[[Iterable[nn.Parameter]], AbstractContextManager[None]]
"""Makes sharded parameters whole for a while; every worker must call it."""


@dataclass(frozen=True)
class TeacherStudent:
    """The models of a recovery: what is trained, and what it is compared with.

    If `teacher` is None, both are in the one model `student`: the teacher is all its
    layers with adapters off, the student its layers `student_layers` with adapters
    on. Otherwise the student is the whole of `student`. For an objective that has no
    teacher, the student is the whole of `student`, too, and `teacher` is None.

    Attributes:
        student: holds the trainable parameters.
        student_layers: indices in `student` of the student's layers, ascending.
        teacher: a separate model, or None.
        teacher_layers: for each student layer, the index in the teacher of the
            layer that it is compared with: `map(l)` of IteRABRe App. E; None where
            that is not given.
        adapted: the PEFT model around `student`, or None with full fine-tuning.
        source_layers: source index of each layer of `student`, for the names in what
            is saved; None if `student` has all layers of the source.
    """

    student: PreTrainedModel
    student_layers: tuple[int, ...]
    teacher: PreTrainedModel | None
    teacher_layers: tuple[int, ...] | None
    adapted: PeftModel | None
    source_layers: tuple[int, ...] | None = None


def shared_teacher_student(adapted: PeftModel, kept: tuple[int, ...]) -> TeacherStudent:
    """Return teacher and student in one adapted source model, the student being its layers `kept`."""
    return TeacherStudent(adapted.get_base_model(), kept, None, kept, adapted)


def load_teacher_student(
    spec: RecoverySpec, has_teacher: bool = True
) -> tuple[TeacherStudent, PreTrainedTokenizerBase]:
    """Load what `spec` trains and its teacher, with the tokenizer of both.

    With adapters and the source as teacher, one model serves both. In all other
    cases, that of DoRA included, whose change to a weight is none of low rank, the student is
    a model of its own, pruned, with the chain of adapters merged into its weights: there, dropped
    layers take no memory. A teacher whose states are stored is not loaded.

    Raises:
        RequestError: adapter targets that suit nothing, settings that contradict one
            another, or a teacher with another tokenizer.
    """
    check_adapter(spec)
    check_teacher(spec, has_teacher)
    if not has_teacher or spec.teacher_states is not None:
        return _separate_student(spec, None, None)
    if spec.teacher is not None:
        teacher, teacher_tokenizer = open_model(spec.teacher)
        teacher = teacher.to(first_place(spec)).requires_grad_(False)
        pair, tokenizer = _separate_student(spec, teacher, spec.teacher_layers)
        if tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
            raise RequestError(
                f"the tokenizer of teacher {spec.teacher.path!r} is not that of {spec.model.source.path!r}: "
                "their vocabularies differ; a teacher must read the same tokens"
            )
        return pair, tokenizer
    source, tokenizer = load_source(spec.model)
    kept = spec.model.kept(depth(source.config))
    source = source.to(first_place(spec))
    if not spec.adapter.leaves_weights and can_share_weights(source, spec.model):
        adapted = attach_adapters(source, spec, kept).to(place_of_training(spec))
        return shared_teacher_student(adapted, kept), tokenizer
    source = source.to(place_of_training(spec))
    return _separate_student(spec, source.requires_grad_(False), kept)


def place_of_training(spec: RecoverySpec) -> torch.device:
    """Return where the models are handed to the engine: the CPU under ZeRO's third stage, which shards them.

    There, no device ever holds a whole model.
    """
    return torch.device("cpu") if zero_stage(spec) == 3 else device()


def first_place(spec: RecoverySpec) -> torch.device:
    """Return where the models are put as they are read.

    Weights that are quantised go to the device block by block, in 4 bits.
    """
    return torch.device("cpu") if spec.adapter.kind == "qlora" else place_of_training(spec)


def check_teacher(spec: RecoverySpec, has_teacher: bool) -> None:
    """Check that a teacher and its layers are given only where they are used.

    Raises:
        RequestError: they are not.
    """
    if spec.teacher is not None and not has_teacher:
        raise RequestError(
            f"objective {spec.objective!r} has no teacher; leave out recovery.teacher or use the objective kd"
        )
    if spec.teacher_layers is not None and spec.teacher is None:
        raise RequestError(
            "recovery.teacher_layers is given without recovery.teacher; the unpruned model's layers are known"
        )


def save_trained(
    pair: TeacherStudent, directory: Path | None, gathered: Gathered = lambda _: nullcontext()
) -> None:
    """Write what was trained: the adapter, or the weights that it leaves; named by source layer.

    DoRA is merged into the weights, in place: the student is not trained any further then.

    Args:
        directory: None in a worker that only takes part in gathering what is sharded.
        gathered: where weights are sharded; full weights are made whole one by one.
    """
    model: nn.Module = pair.student
    if pair.adapted is not None and not pair.adapted.peft_config[CURRENT].use_dora:
        with gathered(p for p in pair.adapted.parameters() if p.requires_grad):
            if directory is not None:
                save_adapter(pair.adapted, directory, pair.source_layers)
        return
    if pair.adapted is not None:
        model = pair.adapted.merge_and_unload().requires_grad_(True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if pair.source_layers is not None:
        trained = rename_layers(trained, find_layers(model).path, dict(enumerate(pair.source_layers)))

    def read(name: str) -> Tensor:
        with gathered([trained[name]]):
            return trained[name].detach().to("cpu", model.config.dtype, copy=True)

    shapes = {
        name: torch.empty(getattr(p, "ds_shape", p.shape), dtype=model.config.dtype, device="meta")
        for name, p in trained.items()
    }
    save_weights_as_read(shapes, read, directory)


def _separate_student(
    spec: RecoverySpec, teacher: PreTrainedModel | None, teacher_layers: tuple[int, ...] | None
) -> tuple[TeacherStudent, PreTrainedTokenizerBase]:
    """Load a pruned student beside a teacher, or without one."""
    student, tokenizer = build_model(spec.model)
    student = student.to(first_place(spec))
    layers = tuple(range(depth(student.config)))
    source_layers = spec.model.kept(len(layers) + len(spec.model.dropped))
    if spec.adapter.kind == "full":
        student.requires_grad_(True)
        return TeacherStudent(student, layers, teacher, teacher_layers, None, source_layers), tokenizer
    adapted = new_adapter(student, spec, layers).to(place_of_training(spec))
    return TeacherStudent(student, layers, teacher, teacher_layers, adapted, source_layers), tokenizer
