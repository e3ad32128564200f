"""A teacher of its own: another depth, a student trained whole, and what cannot be compared."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.contracts import LossSpec
from actors.data import TokenBatch
from actors.errors import RequestError
from actors.models import remove_layers
from actors.recovery.distillation.lockstep_distiller import LockstepDistiller
from actors.recovery.distillation.teacher_student import TeacherStudent
from actors.recovery.losses.logit_losses import LOGIT_LOSSES
from tests.support.tiny_models import tiny_ids, tiny_llama
from tests.unit.recovery.plain import adapted_teacher_student, distillation

MAP = (0, 1, 4, 5)
LOSS = LossSpec(hidden=0.5, attention=3.0, logits=2.0)


def _teacher(num_layers: int = 6, **overrides: object) -> PreTrainedModel:
    return tiny_llama(num_layers, seed=1, **overrides)[0].requires_grad_(False)


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _assert_as_plain(
    student: PreTrainedModel, teacher: PreTrainedModel, pair: TeacherStudent, loss: LossSpec
) -> None:
    """`student` is a copy of the pair's, with PEFT's own forward."""
    plain_teacher = copy.deepcopy(teacher)
    for model in (student, plain_teacher) if loss.attention else ():
        model.set_attn_implementation("eager")
    want = distillation(plain_teacher, student, pair.teacher_layers or MAP, tiny_ids(), loss)
    want["loss"].backward()
    got = LockstepDistiller(pair, loss)(TokenBatch(tiny_ids()))
    got["loss"].backward()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=0)
    mine, theirs = _gradients(pair.student), _gradients(student)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert float((mine[name] - gradient).norm() / gradient.norm()) < 2e-5, name
    assert not _gradients(teacher)


@pytest.mark.parametrize("variant", LOGIT_LOSSES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_student_trained_whole_learns_from_the_unpruned_model(variant: str, tied: bool) -> None:
    teacher = _teacher(tie_word_embeddings=tied)
    student = remove_layers(copy.deepcopy(teacher), [2, 3]).requires_grad_(True)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    pair = TeacherStudent(student, (0, 1, 2, 3), teacher, MAP, None)
    _assert_as_plain(copy.deepcopy(student), teacher, pair, replace(LOSS, logit_loss=variant))


def test_adapters_learn_from_a_teacher_of_another_depth_and_width_by_its_logits() -> None:
    teacher = _teacher(5, hidden_size=48)
    adapted = adapted_teacher_student(tiny_llama(3)[0], (0, 1, 2))
    pair = TeacherStudent(adapted.student, (0, 1, 2), teacher, None, adapted.adapted)
    _assert_as_plain(copy.deepcopy(pair.student), teacher, pair, LossSpec(0, 0, 1, "forward_kl"))


@pytest.mark.parametrize("same_head", [False, True])
def test_the_gram_matrix_is_used_only_if_both_heads_are_one_matrix(same_head: bool) -> None:
    teacher, (student, _) = _teacher(), tiny_llama(4)
    if same_head:
        student.lm_head.weight.data.copy_(teacher.lm_head.weight)
    adapted = adapted_teacher_student(student, (0, 1, 2, 3))
    pair = TeacherStudent(adapted.student, (0, 1, 2, 3), teacher, MAP, adapted.adapted)
    assert (LockstepDistiller(pair, LOSS)._gram_DD is not None) == same_head
    _assert_as_plain(copy.deepcopy(student), teacher, pair, LOSS) if not same_head else None


@pytest.mark.parametrize(
    ("teacher", "teacher_layers", "loss", "message"),
    [
        ({}, None, LOSS, "teacher_layers"),
        ({}, (0, 1, 2), LOSS, "teacher_layers.*4 layers"),
        ({}, (0, 2, 1, 3), LOSS, "ascending"),
        ({}, (0, 1, 2, 6), LOSS, "0 to 5"),
        ({"hidden_size": 64}, MAP, LOSS, "hidden.*hidden_size is 32 .*64"),
        ({"num_attention_heads": 8}, MAP, LOSS, "attention.*num_attention_heads"),
        ({"vocab_size": 400}, None, LossSpec(0, 0, 1), "logits.*vocab_size"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    teacher: dict[str, int], teacher_layers: tuple[int, ...] | None, loss: LossSpec, message: str
) -> None:
    pair = TeacherStudent(tiny_llama(4)[0], (0, 1, 2, 3), _teacher(**teacher), teacher_layers, None)
    with pytest.raises(RequestError, match=message):
        LockstepDistiller(pair, loss)
