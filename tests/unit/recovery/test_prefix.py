"""The student's first blocks: run once for both models, without gradient, or taken from a cache."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.artifacts import publish
from actors.contracts import AdapterSpec, BelowCut, LossSpec, ModelRef, ModelSpec, RecoverySpec, TextSpec
from actors.data import TokenBatch, TopK
from actors.errors import RequestError
from actors.models import LayerwisePass, find_layers
from actors.recovery.adapters.lora import attach_adapters, lora_layers
from actors.recovery.distillation.lockstep_distiller import LockstepDistiller
from actors.recovery.distillation.prefix import first_trainable, shared_prefix
from actors.recovery.distillation.teacher_student import (
    TeacherStudent,
    load_teacher_student,
    save_trained,
    shared_teacher_student,
)
from actors.recovery.objectives import find_objective
from tests.support.tiny_models import save_tiny, tiny_ids, tiny_llama
from tests.unit.recovery.plain import (
    adapted_teacher_student,
    assert_same_gradients,
    distillation,
    separate_student,
)

NUM_LAYERS, DROPPED = 8, (4, 5)
KEPT = (0, 1, 2, 3, 6, 7)
LAYERS = {"all": 0, "after_cut": 4, "below_cut": 2}
IDS_BT = tiny_ids()
LOSSES = {
    "paper": LossSpec(hidden=0.5, attention=3.0, logits=2.0),
    "paper, before the norm": LossSpec(0.5, 3.0, 2.0, last_hidden_state="before_norm"),
    "logits": LossSpec(0, 0, 1, "forward_kl", next_token=0.5),
    "mse and next token": LossSpec(0.5, 0, 1, next_token=0.5),
    "last state": LossSpec(0.3, 0, 1, "skew_kl", hidden_layers="last", hidden_scale="normalised"),
    "next token alone": LossSpec(0, 0, 0, next_token=2.0),
}


def _spec(layers: str = "all", dropped: tuple[int, ...] = DROPPED, **adapter: object) -> RecoverySpec:
    chosen = BelowCut(2) if layers == "below_cut" else layers
    return RecoverySpec(
        model=ModelRef(ModelSpec("source"), dropped),
        data=TextSpec(),
        adapter=AdapterSpec(rank=4, layers=chosen, **adapter),
    )


def _moved(pair: TeacherStudent) -> TeacherStudent:
    """The pair after some training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for name, parameter in pair.student.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return pair


def _pair(layers: str, model: PreTrainedModel | None = None) -> TeacherStudent:
    model = model if model is not None else tiny_llama(NUM_LAYERS)[0]
    return _moved(shared_teacher_student(attach_adapters(model, _spec(layers), KEPT), KEPT))


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def _assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    assert got
    for name, value in want.items():
        assert float((got[name] - value).norm()) <= tolerance * float(value.norm()), name


def _losses_and_gradients(
    module: nn.Module, batch: TokenBatch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    module.zero_grad()
    terms = module(batch)
    terms["loss"].backward()
    return {name: value.detach() for name, value in terms.items()}, _gradients(module)


@contextmanager
def _calls(model: PreTrainedModel) -> Iterator[list[int]]:
    """How often each block runs."""
    LayerwisePass(model, IDS_BT)  # the first pass of a process looks at what a block returns
    calls = [0] * len(find_layers(model).modules)
    hooks = [
        block.mlp.register_forward_pre_hook(
            lambda *_, layer=layer: calls.__setitem__(layer, calls[layer] + 1)
        )
        for layer, block in enumerate(find_layers(model).modules)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("layers", LAYERS)
def test_the_first_trained_block_is_known_from_settings_and_from_models(layers: str) -> None:
    pair = _pair(layers)
    assert first_trainable(pair) == _spec(layers).first_trainable == LAYERS[layers]
    assert shared_prefix(pair) == LAYERS[layers]
    adapted = [bool(lora_layers(block)) for block in find_layers(pair.student).modules]
    assert adapted == [layer in KEPT[LAYERS[layers] :] for layer in range(NUM_LAYERS)]


@pytest.mark.parametrize(
    ("below", "dropped", "want"), [(9, (4,), 0), (1, (6, 2), 1), (0, (0, 7), 0), (3, (), 0)]
)
def test_the_cut_is_the_first_removed_block_of_all_iterations(
    below: int, dropped: tuple[int, ...], want: int
) -> None:
    adapter = AdapterSpec(layers=BelowCut(below))
    model = ModelRef(ModelSpec("source")).without(dropped)
    assert RecoverySpec(model=model, data=TextSpec(), adapter=adapter).first_trainable == want


@pytest.mark.parametrize(
    ("layers", "name"), [("all", "paper"), ("after_cut", "paper"), *(("below_cut", name) for name in LOSSES)]
)
def test_losses_and_every_gradient_are_those_of_two_separate_models(layers: str, name: str) -> None:
    teacher, loss = tiny_llama(NUM_LAYERS)[0], LOSSES[name]
    pair = _pair(layers, copy.deepcopy(teacher))
    if loss.attention:
        teacher.set_attn_implementation("eager")
    student = separate_student(teacher, adapted_teacher_student(copy.deepcopy(teacher), KEPT))
    for layer, block in zip(KEPT, find_layers(student).modules, strict=True):
        trained = find_layers(pair.student).modules[layer]
        if lora_layers(trained):
            block.load_state_dict(trained.state_dict())
        else:
            for module in lora_layers(block):
                module._disable_adapters = True
    want = distillation(teacher, student, KEPT, IDS_BT, loss)
    want["loss"].backward()
    got = LockstepDistiller(pair, loss)(TokenBatch(IDS_BT))
    got["loss"].backward()
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name].detach(), value.detach(), rtol=1e-5, atol=0)
    positions = range(LAYERS[layers], len(KEPT))
    assert_same_gradients(pair, student) if layers == "all" else None
    mine = {
        f"{p}.{n}": v.grad
        for p in positions
        for n, v in find_layers(pair.student).modules[KEPT[p]].named_parameters()
        if v.requires_grad
    }
    theirs = {
        f"{p}.{n}": v.grad
        for p in positions
        for n, v in find_layers(student).modules[p].named_parameters()
        if v.requires_grad
    }
    _assert_same(mine, theirs)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_blocks_below_the_first_trained_one_run_once_and_change_no_number(
    loss: LossSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = _pair("below_cut")
    once = LockstepDistiller(pair, loss, gradient_checkpointing=True)
    with _calls(pair.student) as calls:
        got = _losses_and_gradients(once, TokenBatch(IDS_BT))
    assert calls[:2] == [1, 1]
    monkeypatch.setattr("actors.recovery.distillation.lockstep.shared_prefix", lambda _pair: 0)
    twice = LockstepDistiller(pair, loss, gradient_checkpointing=True)
    want = _losses_and_gradients(twice, TokenBatch(IDS_BT))
    _assert_same(got[0], want[0])
    _assert_same(got[1], want[1])


def _from_cache(pair: TeacherStudent, entering: bool, dtype: torch.dtype = torch.float32) -> TokenBatch:
    """A batch with what a cache holds of the unpruned model."""
    source = tiny_llama(NUM_LAYERS)[0]
    layerwise = LayerwisePass(source, IDS_BT)
    states = [layerwise.hidden_BTD]
    with torch.no_grad():
        for layer in range(NUM_LAYERS):
            states.append(layerwise.block(layer, states[-1]))
        last_BTD = layerwise.finish(states[-1])
    entered_BTD = states[first_trainable(pair)].to(dtype) if entering else None
    return TokenBatch(IDS_BT, teacher_BTD=last_BTD.to(dtype), entering_BTD=entered_BTD)


@pytest.mark.parametrize("loss", [name for name in LOSSES if not LOSSES[name].attention])
@pytest.mark.parametrize(("layers", "entering"), [("all", False), ("below_cut", True), ("below_cut", False)])
def test_a_cache_in_place_of_teacher_and_prefix_changes_no_number(
    layers: str, entering: bool, loss: str
) -> None:
    pair = _pair(layers)
    distiller = LockstepDistiller(pair, LOSSES[loss])
    want = _losses_and_gradients(distiller, TokenBatch(IDS_BT))
    batch = _from_cache(pair, entering)
    with _calls(pair.student) as calls:
        got = _losses_and_gradients(distiller, batch)
    _assert_same(got[0], want[0])
    _assert_same(got[1], want[1])
    by_layer = LOSSES[loss].hidden and LOSSES[loss].hidden_layers == "all"
    first = LAYERS[layers]
    once = [int(layer in KEPT and (layer >= first or not entering)) for layer in range(NUM_LAYERS)]
    assert by_layer or calls == once


def test_a_bfloat16_cache_rounds_the_loss_by_less_than_a_percent() -> None:
    pair = _pair("below_cut")
    distiller = LockstepDistiller(pair, LOSSES["logits"])
    want, _ = _losses_and_gradients(distiller, TokenBatch(IDS_BT))
    got, _ = _losses_and_gradients(distiller, _from_cache(pair, True, torch.bfloat16))
    assert abs(float(got["loss"] / want["loss"]) - 1) < 0.01


def test_top_k_probabilities_from_a_cache_of_the_whole_vocabulary_are_the_exact_teacher() -> None:
    pair = _pair("below_cut")
    distiller = LockstepDistiller(pair, LOSSES["logits"])
    want = _losses_and_gradients(distiller, TokenBatch(IDS_BT))
    log_BTV = tiny_llama(NUM_LAYERS)[0](IDS_BT).logits.detach().log_softmax(-1)
    values_BTK, ids_BTK = log_BTV.topk(log_BTV.shape[-1])
    got = _losses_and_gradients(distiller, TokenBatch(IDS_BT, teacher_topk=TopK(ids_BTK, values_BTK)))
    _assert_same(got[0], want[0])
    # What is left over rounds to 1e-7 of probability.
    _assert_same(got[1], want[1], 1e-3)


@pytest.mark.parametrize("objective", ["healing", "healing_aux"])
@pytest.mark.parametrize("entering", [False, True])
def test_other_objectives_begin_at_the_first_trained_block_too(objective: str, entering: bool) -> None:
    pair = _pair("below_cut")
    build = find_objective(objective).build
    module = build(pair, replace(_spec("below_cut"), objective=objective))
    want = _losses_and_gradients(
        build(_pair("below_cut"), replace(_spec("below_cut"), objective=objective)), TokenBatch(IDS_BT)
    )
    batch = _from_cache(pair, entering=True) if entering else TokenBatch(IDS_BT)
    with _calls(pair.student) as calls:
        got = _losses_and_gradients(module, batch)
    _assert_same(got[0], want[0])
    _assert_same(got[1], want[1])
    assert calls[:2] == ([0, 0] if entering else [1, 1])


def test_an_earlier_adapter_ends_what_teacher_and_student_share(tmp_path: Path) -> None:
    """An earlier recovery trained everywhere: its blocks below the cut are frozen, and not the teacher's."""
    spec = replace(
        _spec("all"), model=ModelRef(ModelSpec(save_tiny(tmp_path / "m", num_layers=NUM_LAYERS)), DROPPED)
    )
    pair, _ = load_teacher_student(spec)
    _moved(pair)
    save_trained(pair, tmp_path / "new")
    earlier = publish(tmp_path / "new", str(tmp_path / "published"))
    spec = replace(spec, model=spec.with_recovery(earlier), adapter=replace(spec.adapter, layers=BelowCut(2)))
    pair, _ = load_teacher_student(spec)
    assert (first_trainable(pair), shared_prefix(pair)) == (2, 0)
    module = LockstepDistiller(pair, LOSSES["logits"])
    _, gradients = _losses_and_gradients(module, TokenBatch(IDS_BT))
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in gradients} == {2, 3, 6, 7}


def test_a_cut_with_nothing_above_it_is_refused() -> None:
    with pytest.raises(RequestError, match=r"after_cut.*first removed one, 6.*below_cut"):
        attach_adapters(tiny_llama(NUM_LAYERS)[0], _spec("after_cut", dropped=(6, 7)), (0, 1, 2, 3, 4, 5))
