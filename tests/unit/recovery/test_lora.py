"""Adapters: what they sit on, how they are saved, and that a chain reads back as the same model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.artifacts import publish
from actors.contracts import AdapterSpec, ArtifactRef, LossSpec, ModelRef, ModelSpec, RecoverySpec, TextSpec
from actors.data import TokenBatch
from actors.errors import RequestError
from actors.models import build_model, load_source
from actors.recovery.adapters.lora import (
    attach_adapters,
    save_adapter,
    target_paths,
    trainable_parameters,
)
from actors.recovery.distillation.lockstep_distiller import LockstepDistiller
from actors.recovery.distillation.teacher_student import shared_teacher_student
from tests.support.tiny_models import save_tiny, tiny_llama

ATTENTION = ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]
FFN = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", FFN + ATTENTION),
        ("ffn", FFN),
        ("attention", ATTENTION),
        (("q_proj", "mlp.down_proj"), ["mlp.down_proj", "self_attn.q_proj"]),
    ],
)
def test_targets(targets: str | tuple[str, ...], expected: list[str]) -> None:
    assert target_paths(tiny_llama(2)[0], targets) == sorted(expected)


def test_targets_that_match_nothing_are_refused_with_what_there_is() -> None:
    with pytest.raises(RequestError, match=r"'c_attn'.*self_attn\.q_proj"):
        target_paths(tiny_llama(2)[0], ("q_proj", "c_attn"))


def test_an_unknown_adapter_kind_is_refused() -> None:
    spec = RecoverySpec(model=ModelRef(ModelSpec("x")), data=TextSpec(), adapter=AdapterSpec(kind="lorra"))
    with pytest.raises(RequestError, match="lorra"):
        attach_adapters(tiny_llama(2)[0], spec, (0, 1))


def _trained_like(path: str, ref: ModelRef, kept: tuple[int, ...], seed: int) -> LockstepDistiller:
    """A distiller of `ref` whose new adapter is moved away from zero."""
    spec = RecoverySpec(model=ref, data=TextSpec(), adapter=AdapterSpec(rank=4, alpha=8), seed=seed)
    model, _ = load_source(ref)
    adapted = attach_adapters(model, spec, kept)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(adapted):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return LockstepDistiller(shared_teacher_student(adapted, kept), LossSpec(1, 0, 1))


def _saved(distiller: LockstepDistiller, directory: Path, uri: str) -> ArtifactRef:
    save_adapter(distiller.pair.adapted, directory)
    return publish(directory, uri)


def test_a_chain_with_layers_dropped_in_between_reads_back_as_the_student(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", num_layers=6)
    ids_BT = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    ref = ModelRef(ModelSpec(path), dropped=(4,))
    first = _trained_like(path, ref, (0, 1, 2, 3, 5), seed=1)
    adapter = _saved(first, tmp_path / "a1", str(tmp_path / "store" / "a1"))
    ref = ref.adapted(adapter).without((1, 2))
    second = _trained_like(path, ref, (0, 3, 5), seed=2)
    ref = ref.adapted(_saved(second, tmp_path / "a2", str(tmp_path / "store" / "a2")))

    merged, _ = build_model(ref)
    assert merged.config.num_hidden_layers == 3
    with torch.no_grad():
        got = merged(ids_BT, use_cache=False).logits
        hidden_BTD = second.eval().hidden(TokenBatch(ids_BT))
        want = second.pair.adapted.get_base_model().get_output_embeddings()(hidden_BTD)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_only_the_new_adapter_trains_and_the_chain_stays_as_it_was(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", num_layers=4)
    ref = ModelRef(ModelSpec(path), dropped=(2,))
    adapter = _saved(_trained_like(path, ref, (0, 1, 3), seed=1), tmp_path / "a", str(tmp_path / "store"))
    distiller = _trained_like(path, ref.adapted(adapter), (0, 1, 3), seed=2)
    trainable = [name for name, p in distiller.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * 7 * 2
    assert all(".current." in name for name in trainable)
    distiller(TokenBatch(torch.randint(0, 300, (1, 8))))["loss"].backward()
    assert all(p.grad is None for p in distiller.parameters() if not p.requires_grad)
    assert all(p.grad is not None for p in trainable_parameters(distiller))


def test_the_saved_adapter_is_an_ordinary_peft_directory_named_by_source_layer(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", num_layers=4)
    distiller = _trained_like(path, ModelRef(ModelSpec(path), dropped=(1, 2)), (0, 3), seed=1)
    save_adapter(distiller.pair.adapted, tmp_path / "a")
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name.split(".layers.")[1].split(".")[0] for name in names} == {"0", "3"}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [0, 3]
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_the_new_adapter_depends_on_the_seed_alone() -> None:
    drawn = []
    for global_seed, seed in [(1, 5), (2, 5), (2, 6)]:
        model, _ = tiny_llama(2)
        torch.manual_seed(global_seed)
        spec = RecoverySpec(
            model=ModelRef(ModelSpec("x")), data=TextSpec(), adapter=AdapterSpec(rank=2), seed=seed
        )
        adapted = attach_adapters(model, spec, (0, 1))
        drawn.append(torch.cat([p.flatten() for p in trainable_parameters(adapted)]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
