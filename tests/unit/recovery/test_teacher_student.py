"""What is loaded to be trained and to learn from, and that what is saved reads back as the student."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from actors.artifacts import publish
from actors.contracts import AdapterSpec, ArtifactRef, BelowCut, ModelRef, ModelSpec, RecoverySpec, TextSpec
from actors.errors import RequestError, WorkError
from actors.models import (
    LayerwisePass,
    build_model,
    depth,
    find_layers,
    load_model,
    load_streamed,
    resident,
    save_weights,
)
from actors.recovery.adapters.lora import adapters_disabled, lora_layers, stage_seed, trainable_parameters
from actors.recovery.check import check_recovery
from actors.recovery.distillation.teacher_student import TeacherStudent, load_teacher_student, save_trained
from tests.support.tiny_models import save_tiny, tiny_ids, tiny_model, tiny_tokenizer

IDS_BT = tiny_ids(2, 16)


def _spec(path: str, dropped: tuple[int, ...] = (2,), kind: str = "lora", **settings: object) -> RecoverySpec:
    adapter = AdapterSpec(kind) if kind == "full" else AdapterSpec(kind, rank=4)
    return RecoverySpec(
        model=ModelRef(ModelSpec(path), dropped), data=TextSpec(), adapter=adapter, **settings
    )


def _move(pair: TeacherStudent, seed: int = 0, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(pair.student):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@torch.no_grad()
def _student_logits(pair: TeacherStudent) -> Tensor:
    layerwise = LayerwisePass(pair.student, IDS_BT)
    hidden_BTD = layerwise.hidden_BTD
    for layer in pair.student_layers:
        hidden_BTD = layerwise.block(layer, hidden_BTD)
    return pair.student.get_output_embeddings()(layerwise.finish(hidden_BTD))


@torch.no_grad()
def _logits(model: torch.nn.Module) -> Tensor:
    return model(IDS_BT, use_cache=False).logits


def _saved(pair: TeacherStudent, directory: Path) -> ArtifactRef:
    save_trained(pair, directory / "new")
    return publish(directory / "new", str(directory / "published"))


def _assert_same(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("pair") / "model", num_layers=6)


@pytest.mark.parametrize("objective", ["kd", "healing"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_chain_of_three_is_the_same_unmerged_and_merged(
    path: str, tmp_path: Path, objective: str, dtype: str, tolerance: float
) -> None:
    """Relative L2 error of the logits. bfloat16 keeps 8 bits, to which merged weights are rounded again."""
    spec = _spec(path, objective=objective)
    spec = replace(spec, model=replace(spec.model, source=replace(spec.model.source, dtype=dtype)))
    for number, dropped in enumerate([(), (4,), (0,)]):
        spec = replace(spec, model=spec.model.without(dropped))
        pair, _ = load_teacher_student(spec)
        _move(pair, seed=number)
        last = _student_logits(pair)
        spec = replace(spec, model=spec.with_recovery(_saved(pair, tmp_path / str(number))))
    assert len(spec.model.adapters) == 3
    merged = _logits(build_model(spec.model)[0])
    assert (merged - last).float().norm() / last.float().norm() < tolerance


def test_an_objective_without_teacher_loads_neither_teacher_nor_dropped_layers(path: str) -> None:
    pair, _ = load_teacher_student(_spec(path, dropped=(1, 2)), has_teacher=False)
    assert pair.teacher is None
    assert pair.student_layers == (0, 1, 2, 3)
    assert pair.source_layers == (0, 3, 4, 5)
    assert len(find_layers(pair.student).modules) == 4


def test_full_fine_tuning_trains_all_weights_beside_the_unpruned_teacher(path: str, tmp_path: Path) -> None:
    spec = _spec(path, kind="full")
    pair, _ = load_teacher_student(spec)
    assert all(parameter.requires_grad for parameter in pair.student.parameters())
    assert not any(parameter.requires_grad for parameter in pair.teacher.parameters())
    assert pair.teacher_layers == (0, 1, 3, 4, 5)
    _move(pair)
    want = _student_logits(pair)
    trained = spec.with_recovery(_saved(pair, tmp_path))
    assert trained.adapters == ()
    _assert_same(_logits(build_model(trained)[0]), want)
    _assert_same(_logits(pair.teacher), _logits(load_model(path)[0]))


def test_trained_weights_follow_their_source_layers(path: str, tmp_path: Path) -> None:
    spec = _spec(path, kind="full", objective="healing")
    pair, _ = load_teacher_student(spec)
    _move(pair)
    later = spec.with_recovery(_saved(pair, tmp_path)).without((0,))
    with torch.no_grad():
        pair = replace(pair, student_layers=(1, 2, 3, 4))
        want = _student_logits(pair)
    _assert_same(_logits(build_model(later)[0]), want)

    streamed = load_streamed(later, torch.device("cpu"))
    layerwise = LayerwisePass(streamed, IDS_BT)
    hidden_BTD = layerwise.hidden_BTD
    with torch.no_grad():
        for layer in range(4):
            with resident(streamed, layer):
                hidden_BTD = layerwise.block(layer, hidden_BTD)
        _assert_same(streamed.get_output_embeddings()(layerwise.finish(hidden_BTD)), want)


def test_full_fine_tuning_takes_in_the_chain(path: str, tmp_path: Path) -> None:
    spec = _spec(path)
    pair, _ = load_teacher_student(spec)
    _move(pair)
    chained = spec.with_recovery(_saved(pair, tmp_path / "lora"))
    full = replace(_spec(path, kind="full"), model=chained)
    pair, _ = load_teacher_student(full)
    _move(pair, seed=1)
    _assert_same(
        _logits(build_model(full.with_recovery(_saved(pair, tmp_path / "full")))[0]), _student_logits(pair)
    )


@pytest.mark.parametrize("variant", [{"rslora": True}, {"dora": True}, {"dora": True, "rslora": True}])
def test_other_adapters_of_peft_read_back_as_the_student_over_iterations(
    path: str, tmp_path: Path, variant: dict[str, bool]
) -> None:
    """Plain LoRA first, then two of this kind on top, each with another layer dropped."""
    spec = _spec(path)
    for number, (dropped, more) in enumerate([((), {}), ((4,), variant), ((0,), variant)]):
        spec = replace(spec, model=spec.model.without(dropped), adapter=replace(spec.adapter, **more))
        pair, _ = load_teacher_student(spec)
        _move(pair, seed=number)
        want = _student_logits(pair)
        scale = 2.0 if spec.adapter.rslora else 1.0
        layer = lora_layers(find_layers(pair.student).modules[-1])[0]
        assert layer.scaling["current"] == scale
        spec = replace(spec, model=spec.with_recovery(_saved(pair, tmp_path / str(number))))
        _assert_same(_logits(build_model(spec.model)[0]), want)
    assert bool(spec.model.adapters) != spec.adapter.dora


def test_dora_is_compared_with_the_unpruned_model(path: str) -> None:
    spec = replace(_spec(path), adapter=AdapterSpec(rank=4, dora=True, layers=BelowCut(1)))
    pair, _ = load_teacher_student(spec)
    assert depth(pair.teacher.config) == 6
    assert pair.teacher_layers == (0, 1, 3, 4, 5)
    _assert_same(_student_logits(pair), _logits(build_model(spec.model)[0]))
    trained = {name for name, p in pair.student.named_parameters() if p.requires_grad}
    assert {name.split(".layers.")[1][0] for name in trained} == {"1", "2", "3", "4"}
    assert any("magnitude" in name for name in trained)


def test_weights_of_another_model_are_refused(path: str, tmp_path: Path) -> None:
    save_weights({"model.layers.0.mlp.down_proj.weight": torch.zeros(3, 3)}, tmp_path / "new")
    ref = ModelRef(ModelSpec(path)).bridged(publish(tmp_path / "new", str(tmp_path / "published")))
    with pytest.raises(WorkError, match="down_proj"):
        build_model(ref)


def test_a_few_replaced_weights_are_switched_off_for_the_teacher(path: str, tmp_path: Path) -> None:
    """One model serves both: with adapters off it is the source, with them on it has the new weights."""
    name = "model.layers.1.mlp.down_proj.weight"
    save_weights({name: torch.randn(32, 64, generator=torch.Generator().manual_seed(0))}, tmp_path / "new")
    weights = publish(tmp_path / "new", str(tmp_path / "published"))
    spec = _spec(path)
    spec = replace(spec, model=spec.model.bridged(weights))
    pair, _ = load_teacher_student(spec)
    assert pair.teacher is None
    _assert_same(_student_logits(pair), _logits(build_model(spec.model)[0]))
    with adapters_disabled(
        [layer for block in find_layers(pair.student).modules for layer in lora_layers(block)]
    ):
        _assert_same(_logits(pair.student), _logits(load_model(path)[0]))


def test_weights_that_are_all_new_make_two_models(path: str, tmp_path: Path) -> None:
    full = _spec(path, kind="full", objective="healing")
    pair, _ = load_teacher_student(full)
    _move(pair)
    spec = replace(_spec(path), model=full.with_recovery(_saved(pair, tmp_path)))
    again, _ = load_teacher_student(spec)
    assert again.teacher is not None
    _assert_same(_student_logits(again), _student_logits(pair))
    _assert_same(_logits(again.teacher), _logits(load_model(path)[0]))


def test_a_teacher_of_any_depth(path: str, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", num_layers=3, seed=5)
    spec = _spec(path, teacher=ModelSpec(teacher), teacher_layers=(0, 0, 1, 1, 2))
    pair, _ = load_teacher_student(spec)
    assert depth(pair.teacher.config) == 3
    assert pair.teacher_layers == (0, 0, 1, 1, 2)
    assert len(pair.student_layers) == 5


def test_a_teacher_with_another_tokenizer_is_refused(path: str, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher")
    other: PreTrainedTokenizerFast = tiny_tokenizer()
    other.add_tokens(["<another>"])
    other.save_pretrained(teacher)
    with pytest.raises(RequestError, match="vocabularies differ"):
        load_teacher_student(_spec(path, teacher=ModelSpec(teacher)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_layers": (0, 1)}, "without recovery.teacher"),
        ({"adapter": AdapterSpec("full", rank=8)}, r"adapter\.rank .*'full'"),
        ({"adapter": AdapterSpec("full", targets="ffn")}, r"adapter\.targets .*'full'"),
        ({"adapter": AdapterSpec("lora", double_quantization=False)}, "double_quantization"),
        ({"adapter": AdapterSpec("full", layers="after_cut")}, r"adapter\.layers .*'full'"),
        ({"adapter": AdapterSpec("qlora", dora=True)}, r"adapter\.dora .*'qlora'"),
        ({"adapter": AdapterSpec(rank=0)}, "rank"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, object], message: str) -> None:
    spec = RecoverySpec(**({"model": ModelRef(ModelSpec("x")), "data": TextSpec()} | settings))
    with pytest.raises(RequestError, match=message):
        load_teacher_student(spec)


def test_a_teacher_for_an_objective_that_has_none_is_refused() -> None:
    spec = RecoverySpec(
        model=ModelRef(ModelSpec("x")), data=TextSpec(), objective="healing", teacher=ModelSpec("x")
    )
    with pytest.raises(RequestError, match="'healing' has no teacher"):
        check_recovery(spec, workers=1)


def test_every_stage_of_a_trajectory_has_a_seed_of_its_own() -> None:
    adapter = ArtifactRef("a", ())
    for kind, models in {
        "lora": [ModelRef(ModelSpec("x"), (3,)), ModelRef(ModelSpec("x"), (2, 3), (adapter,))],
        "full": [ModelRef(ModelSpec("x"), (3,)), ModelRef(ModelSpec("x"), (2, 3), weights=adapter)],
    }.items():
        seeds = [
            stage_seed(RecoverySpec(model=m, data=TextSpec(), adapter=AdapterSpec(kind))) for m in models
        ]
        assert seeds[0] != seeds[1]


@pytest.mark.parametrize("double", [True, False])
def test_qlora_quantises_the_blocks_linear_layers_only(path: str, tmp_path: Path, double: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    spec = _spec(path, kind="qlora")
    spec = replace(spec, adapter=replace(spec.adapter, double_quantization=double))
    pair, _ = load_teacher_student(spec)
    quantised = {n for n, m in pair.student.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    plain = {n for n, m in load_model(path)[0].named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name.removesuffix(".base_layer") for name in quantised} == plain - {"lm_head"}
    down = pair.student.model.layers[0].mlp.down_proj.base_layer.weight
    assert (down.quant_type, down.quant_state.nested, down.data.dtype) == ("nf4", double, torch.uint8)
    _move(pair)
    merged, _ = build_model(spec.with_recovery(_saved(pair, tmp_path)))
    lora = {n: p for n, p in pair.student.named_parameters() if ".lora_" in n}
    a, b = (lora[f"model.layers.0.mlp.down_proj.lora_{x}.current.weight"] for x in "AB")
    source = load_model(path)[0].model.layers[0].mlp.down_proj.weight
    _assert_same(merged.model.layers[0].mlp.down_proj.weight, source + b @ a)


def test_qlora_trains_through_the_weights_that_it_dequantises(path: str) -> None:
    """Logits and gradients are those of a LoRA on the dequantised weights."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantised, _ = load_teacher_student(_spec(path, kind="qlora"))
    plain, _ = load_teacher_student(_spec(path))
    for name, module in quantised.student.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.student.get_submodule(name).weight.data = weight.float()
    gradients = []
    for pair in (plain, quantised):
        _move(pair)
        with torch.no_grad():
            _logits(pair.student)
        layerwise = LayerwisePass(pair.student, IDS_BT)
        hidden_BTD = layerwise.hidden_BTD
        for layer in pair.student_layers:
            hidden_BTD = layerwise.block(layer, hidden_BTD)
        hidden_BTD.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainable_parameters(pair.student)]))
    _assert_same(gradients[1], gradients[0], 1e-4)
    _assert_same(_student_logits(quantised), _student_logits(plain), 1e-4)


def test_qlora_names_the_layers_that_it_cannot_hold(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"'gpt2'.*c_attn.*lora"):
        load_teacher_student(_spec(str(tmp_path), kind="qlora"))
