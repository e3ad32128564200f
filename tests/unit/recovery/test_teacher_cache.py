"""With the teacher's stored states, a recovery has the losses and gradients that it has with the teacher."""

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from actors.artifacts import publish
from actors.contracts import (
    AdapterSpec,
    ArtifactRef,
    BelowCut,
    LossSpec,
    ModelRef,
    ModelSpec,
    RecoverySpec,
    TeachSpec,
    TextSpec,
)
from actors.data import TrainingData, with_teacher_states
from actors.models import find_layers
from actors.recovery import cache_obstacle, find_objective, training_data
from actors.recovery.distillation.teacher_student import TeacherStudent, load_teacher_student, save_trained
from actors.recovery.training.deepspeed_config import settings_fingerprint
from actors.teaching import teach_locally
from tests.support.tiny_models import save_tiny, tiny_tokenizer

_TEXT = "The quick brown fox jumps over the lazy dog . Stability of the higher layer is greater . "
KL = LossSpec(hidden=0.0, attention=0.0, logits=1.0, logit_loss="forward_kl")
CHOSEN = torch.tensor([5, 0, 3])


@pytest.fixture
def spec(tmp_path: Path) -> RecoverySpec:
    """A recovery of six layers without one, which already has an adapter of an earlier recovery."""
    path = save_tiny(tmp_path / "model", num_layers=6)
    (tmp_path / "text.txt").write_text("\n".join(f" = Part {i} = \n{i} {_TEXT}" for i in range(20)))
    spec = RecoverySpec(
        model=ModelRef(ModelSpec(path), dropped=(3,)),
        data=TextSpec(path=str(tmp_path / "text.txt")),
        loss=KL,
        adapter=AdapterSpec(rank=4),
        sequence_length=16,
        batch_size=4,
        max_tokens=256,
    )
    return replace(spec, model=replace(spec.model, adapters=(earlier_adapter(spec, tmp_path),)))


def earlier_adapter(spec: RecoverySpec, tmp_path: Path) -> ArtifactRef:
    pair, _ = load_teacher_student(replace(spec, adapter=AdapterSpec(rank=4, layers=BelowCut(1))))
    draw_adapters(pair, seed=1)
    (tmp_path / "earlier").mkdir()
    save_trained(pair, tmp_path / "earlier")
    return publish(tmp_path / "earlier", str(tmp_path / "published"))


def trained(pair: TeacherStudent) -> dict[str, Tensor]:
    """Return what is trained by names in the source: the student alone numbers its layers anew."""
    path = find_layers(pair.student).path

    def renamed(name: str) -> str:
        if pair.source_layers is None:
            return name
        layers = pair.source_layers
        return re.sub(rf"({re.escape(path)}\.)(\d+)", lambda m: f"{m[1]}{layers[int(m[2])]}", name)

    assert pair.adapted is not None
    named = pair.adapted.named_parameters()
    return {renamed(name): value for name, value in named if value.requires_grad}


@torch.no_grad()
def draw_adapters(pair: TeacherStudent, seed: int) -> None:
    """Give every trained matrix random values, the same for either way of loading: zeros have no gradient."""
    generator = torch.Generator().manual_seed(seed)
    for _, value in sorted(trained(pair).items()):
        value.copy_(0.1 * torch.randn(value.shape, generator=generator))


class Step(NamedTuple):
    terms: dict[str, float]
    gradients: dict[str, Tensor]
    num_layers: int


def one_step(spec: RecoverySpec, data: TrainingData) -> Step:
    """Return losses and gradients of one batch."""
    pair, _ = load_teacher_student(spec)
    draw_adapters(pair, seed=2)
    build = find_objective(spec.objective).build
    assert build is not None
    module = build(pair, spec)
    module.train()
    terms = module(data.batch(CHOSEN))  # type: ignore[arg-type]
    terms["loss"].backward()
    gradients = {name: value.grad for name, value in trained(pair).items()}
    assert all(value is not None for value in gradients.values())
    return Step(
        {name: float(value) for name, value in terms.items()},
        gradients,  # type: ignore[arg-type]
        len(find_layers(pair.student).modules),
    )


def teaching(spec: RecoverySpec, **changes: object) -> TeachSpec:
    plain = TeachSpec(
        model=spec.model.source,
        data=spec.data,
        packing=spec.packing,
        sequence_length=spec.sequence_length,
        states="float32",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


LAST = replace(KL, hidden=0.5, hidden_layers="last", hidden_scale="normalised", next_token=0.3)


@pytest.mark.parametrize(
    ("changes", "entering"),
    [
        ({}, ()),
        ({"loss": replace(KL, logit_loss="mse")}, ()),
        ({"loss": LAST, "packing": "documents"}, ()),
        ({"adapter": AdapterSpec(rank=4, layers=BelowCut(1))}, (2,)),
    ],
    ids=["kl", "mse", "last hidden, documents", "prefix"],
)
def test_stored_states_give_the_losses_and_gradients_of_the_teacher(
    spec: RecoverySpec, tmp_path: Path, changes: dict[str, object], entering: tuple[int, ...]
) -> None:
    spec = replace(spec, **changes)  # type: ignore[arg-type]
    data = training_data(spec, tiny_tokenizer())
    off = one_step(spec, data)
    states = teach_locally(teaching(spec, entering=entering), str(tmp_path / "taught")).artifact
    taught = with_teacher_states(data, states, spec.first_trainable)
    assert (taught.batch(CHOSEN).entering_BTD is not None) == bool(entering)  # type: ignore[arg-type]
    hidden = one_step(replace(spec, teacher_states=states), taught)

    assert (off.num_layers, hidden.num_layers) == (6, 5)  # the dropped block is not loaded
    assert off.terms == pytest.approx(hidden.terms, rel=1e-5)
    assert off.gradients.keys() == hidden.gradients.keys()
    for name, gradient in off.gradients.items():
        assert (gradient - hidden.gradients[name]).norm() <= 1e-5 * gradient.norm(), name


def test_states_in_bfloat16_change_losses_and_gradients_by_their_rounding(
    spec: RecoverySpec, tmp_path: Path
) -> None:
    data = training_data(spec, tiny_tokenizer())
    off = one_step(spec, data)
    states = teach_locally(teaching(spec, states="bfloat16"), str(tmp_path / "taught")).artifact
    rounded = one_step(replace(spec, teacher_states=states), with_teacher_states(data, states))
    assert off.terms == pytest.approx(rounded.terms, rel=2**-8)
    for name, gradient in off.gradients.items():
        assert (gradient - rounded.gradients[name]).norm() <= 2**-7 * gradient.norm(), name


def test_all_tokens_as_top_k_are_the_whole_distribution(spec: RecoverySpec, tmp_path: Path) -> None:
    data = training_data(spec, tiny_tokenizer())
    off = one_step(spec, data)
    states = teach_locally(teaching(spec, top_k=10_000), str(tmp_path / "taught")).artifact
    topk = one_step(
        replace(spec, teacher_states=states, teacher_cache="topk"), with_teacher_states(data, states)
    )
    assert off.terms == pytest.approx(topk.terms, rel=1e-3)
    for name, gradient in off.gradients.items():
        assert (gradient - topk.gradients[name]).norm() <= 5e-3 * gradient.norm(), name


def test_when_the_teacher_has_to_run(spec: RecoverySpec) -> None:
    def obstacle(cache: str, **changes: object) -> str | None:
        return cache_obstacle(replace(spec, **changes), cache)  # type: ignore[arg-type]

    assert obstacle("hidden") is None
    assert obstacle("topk") is None
    assert obstacle("hidden", loss=LAST) is None
    assert obstacle("topk", adapter=AdapterSpec(kind="full")) is None
    cases = {
        "compare single layers": ("hidden", {"loss": LossSpec()}),
        "the objective 'healing_aux' has no use": ("hidden", {"objective": "healing_aux"}),
        "is the quantised model": ("hidden", {"adapter": AdapterSpec(kind="qlora")}),
        "trains the head": ("hidden", {"adapter": AdapterSpec(kind="full")}),
        "has a head of its own": ("hidden", {"teacher": ModelSpec("other")}),
        "topk stores none": ("topk", {"loss": LAST}),
        "temperature 1, and no logits": ("topk", {"loss": replace(KL, temperature=2.0)}),
        "compares nothing with the teacher": ("hidden", {"loss": replace(KL, logits=0.0, next_token=1.0)}),
    }
    for expected, (cache, changes) in cases.items():
        assert expected in str(obstacle(cache, **changes))


def test_a_training_goes_on_from_checkpoints_with_the_cache_and_without(spec: RecoverySpec) -> None:
    cached = replace(spec, teacher_states=ArtifactRef("x", ()), teacher_cache="hidden", teacher_cache_gb=1.0)
    assert settings_fingerprint(cached) == settings_fingerprint(spec)
    topk = replace(spec, teacher_cache="topk")
    assert settings_fingerprint(topk) != settings_fingerprint(spec)
    assert settings_fingerprint(topk) != settings_fingerprint(replace(topk, teacher_top_k=5))
