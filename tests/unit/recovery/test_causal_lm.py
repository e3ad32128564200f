"""Healing, fine-tuning and the auxiliary loss against the family's own loss and plain hooks."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.contracts import LossSpec, ModelRef, ModelSpec, RecoverySpec, TextSpec
from actors.data import TokenBatch
from actors.errors import RequestError
from actors.recovery.distillation.teacher_student import TeacherStudent
from actors.recovery.objectives import find_objective
from tests.support.tiny_models import tiny_ids, tiny_model
from tests.unit.recovery.plain import adapted_teacher_student, assert_same_gradients, run, separate_student

SPEC = RecoverySpec(model=ModelRef(ModelSpec("source")), data=TextSpec(), loss=LossSpec(auxiliary=0.3))
IGNORED = -100


def _module(objective: str, pair: TeacherStudent, spec: RecoverySpec = SPEC) -> torch.nn.Module:
    build = find_objective(objective).build
    assert build
    return build(pair, spec)


def _models(family: str, kept: tuple[int, ...]) -> tuple[PreTrainedModel, TeacherStudent, PreTrainedModel]:
    """The unpruned model, a shared pair, and the pair's student as a model of its own."""
    model = tiny_model(family)
    pair = adapted_teacher_student(copy.deepcopy(model), kept)
    return model, pair, separate_student(model, pair)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_healing_is_the_familys_own_loss(family: str, checkpointing: bool) -> None:
    _, pair, student = _models(family, (0, 1, 3, 5))
    ids_BT = tiny_ids()
    want = student(ids_BT, labels=ids_BT, use_cache=False).loss
    want.backward()
    terms = _module("healing", pair, replace(SPEC, gradient_checkpointing=checkpointing))(TokenBatch(ids_BT))
    terms["loss"].backward()
    assert set(terms) == {"causal_lm", "loss"}
    torch.testing.assert_close(terms["loss"], want, rtol=1e-5, atol=0)
    assert_same_gradients(pair, student)


@pytest.mark.parametrize("objective", ["sft", "sgr"])
def test_answers_alone_are_learned(objective: str) -> None:
    _, pair, student = _models("llama", (0, 1, 3, 5))
    ids_BT, mask_BT = tiny_ids(), torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    targets_BT = torch.tensor([[0] * 7 + [1] * 5, [0] * 4 + [1] * 5 + [0] * 3])
    labels_BT = ids_BT.masked_fill(targets_BT == 0, IGNORED)
    want = student(ids_BT, attention_mask=mask_BT, labels=labels_BT, use_cache=False).loss
    want.backward()
    loss = _module(objective, pair)(TokenBatch(ids_BT, mask_BT, targets_BT))["loss"]
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    assert_same_gradients(pair, student)


def test_healing_computes_nothing_of_a_teacher() -> None:
    _, pair, _ = _models("llama", (0, 1, 3, 5))
    module, ran = _module("healing", pair), []
    for layer, block in enumerate(pair.student.model.layers):
        block.mlp.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    module(TokenBatch(tiny_ids()))
    assert ran == [0, 1, 3, 5]


def _entering(model: PreTrainedModel, ids_BT: Tensor) -> list[Tensor]:
    """What enters each block and, last, the final norm."""
    entered: list[Tensor] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _m, args: entered.append(args[0]))
    hidden, _ = run(model, ids_BT)
    hook.remove()
    return [*entered, *hidden]


@pytest.mark.parametrize(
    ("kept", "cuts"),
    [((0, 1, 4, 5), {2: 4}), ((0, 3, 5), {1: 3, 2: 5}), ((2, 3), {0: 2, 2: 6}), ((0, 1, 2), {3: 6})],
)
def test_the_auxiliary_loss_compares_what_enters_the_layer_behind_each_cut(
    kept: tuple[int, ...], cuts: dict[int, int]
) -> None:
    teacher, pair, student = _models("llama", kept)
    ids_BT = tiny_ids()
    with torch.no_grad():
        of_teacher = _entering(teacher, ids_BT)
    of_student = _entering(student, ids_BT)
    auxiliary = sum(torch.nn.functional.mse_loss(of_student[s], of_teacher[t]) for s, t in cuts.items())
    likelihood = student(ids_BT, labels=ids_BT, use_cache=False).loss
    (likelihood + 0.3 * auxiliary).backward()
    terms = _module("healing_aux", pair)(TokenBatch(ids_BT))
    terms["loss"].backward()
    torch.testing.assert_close(terms["causal_lm"], likelihood, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["auxiliary"], auxiliary, rtol=1e-5, atol=0)
    assert_same_gradients(pair, student)


def test_without_its_weight_the_auxiliary_loss_is_not_computed() -> None:
    _, pair, _ = _models("llama", (0, 1, 3))
    spec = replace(SPEC, loss=LossSpec(auxiliary=0.0))
    assert set(_module("healing_aux", pair, spec)(TokenBatch(tiny_ids()))) == {"causal_lm", "loss"}


def test_the_auxiliary_loss_needs_to_know_the_cuts() -> None:
    model = tiny_model("llama")
    with pytest.raises(RequestError, match="teacher_layers"):
        _module("healing_aux", TeacherStudent(model, tuple(range(6)), tiny_model("llama"), None, None))
