"""The student, and the teacher that it learns from."""

from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.contracts import RecoverySpec
from actors.models import depth, device, load_source
from actors.recovery.adapters import attach_adapters


@dataclass(frozen=True)
class Pair:
    """What a recovery trains and what it compares that with.

    If `teacher` is None, both live in the one model `student`: the teacher is all its
    layers with adapters off, the student its layers `student_layers` with adapters
    on. Otherwise the student is the whole of `student`.

    Attributes:
        student: holds the trainable parameters.
        student_layers: indices in `student` of the student's layers, ascending.
        teacher: a separate model, or None.
        teacher_layers: for each student layer, the index in the teacher of the
            layer that it is compared with: `map(l)` of DESIGN §6; None where
            nothing says which that is.
        adapted: the PEFT model around `student`, or None with full fine-tuning.
    """

    student: PreTrainedModel
    student_layers: tuple[int, ...]
    teacher: PreTrainedModel | None
    teacher_layers: tuple[int, ...] | None
    adapted: PeftModel | None


def shared_pair(adapted: PeftModel, kept: tuple[int, ...]) -> Pair:
    """Teacher and student in one adapted source model, the student being its layers `kept`."""
    return Pair(adapted.get_base_model(), kept, None, kept, adapted)


def load_pair(spec: RecoverySpec) -> tuple[Pair, PreTrainedTokenizerBase]:
    """Load what `spec` trains and its teacher, with the tokenizer of both.

    Raises:
        RequestError: adapter targets that suit nothing.
    """
    model, tokenizer = load_source(spec.model)
    kept = spec.model.kept(depth(model.config))
    adapted = attach_adapters(model.to(device()), spec, kept)
    return shared_pair(adapted, kept), tokenizer
