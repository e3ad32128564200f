"""From a `ModelRef` to a model, against weight changes made by hand."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

from actors.artifacts import publish
from actors.contracts import (
    ArtifactRef,
    EvaluationSpec,
    ModelRef,
    ModelSpec,
    PerplexitySpec,
    TextSpec,
    common_base,
)
from actors.evaluation import evaluate_model, evaluate_prunings, layer_sweep
from actors.models import build_model, load_model, load_streamed, remove_layers, resident
from actors.models.model_builder import merge_adapters, rename_layers
from tests.support.tiny_models import save_tiny, skipped, tiny_ids, tiny_llama, tiny_model

RANK, ALPHA = 2, 6.0
TARGETS = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 64)}
"""Adapted layers of the tiny Llama and their (outputs, inputs)."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""A [r, inputs] and B [outputs, r] of each adapted weight, by the layer's path in the model."""


def _draw(layers: Sequence[int], seed: int, path: str = "model.layers") -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{path}.{layer}.{target}": (
            torch.randn(RANK, inputs, generator=generator),
            torch.randn(outputs, RANK, generator=generator),
        )
        for layer in layers
        for target, (outputs, inputs) in TARGETS.items()
    }


def _save_adapter(
    factors: Factors, layers: Sequence[int], directory: Path, **settings: object
) -> ArtifactRef:
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, layers_to_transform=list(layers), task_type="CAUSAL_LM", **settings
    )
    config.save_pretrained(str(directory / "new"))
    save_file(tensors, directory / "new" / "adapter_model.safetensors", metadata={"format": "pt"})
    return publish(directory / "new", str(directory / "published"))


def _llama_adapter(directory: Path, layers: Sequence[int], seed: int) -> tuple[Factors, ArtifactRef]:
    factors = _draw(layers, seed)
    targets = {"target_modules": list(TARGETS), "layers_pattern": "layers"}
    return factors, _save_adapter(factors, layers, directory, **targets)


def test_the_common_base_of_prunings_lacks_what_they_all_lack(tmp_path: Path) -> None:
    _, adapter = _llama_adapter(tmp_path, [0, 2], seed=1)
    model = ModelRef(ModelSpec("m"), dropped=(3,)).adapted(adapter)
    prunings = [model.without((layer,)) for layer in (0, 1)]
    assert common_base(prunings) == common_base([model, *prunings]) == model
    assert common_base(prunings[:1]) == prunings[0]
    with pytest.raises(ValueError, match="more than their dropped layers"):
        common_base([model, replace(model, adapters=())])


def test_prunings_of_a_loaded_model_are_those_that_are_loaded_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapted model that has lost a layer before: two more prunings of it, loaded once."""
    source = ModelSpec(save_tiny(tmp_path / "model", 4))
    _, adapter = _llama_adapter(tmp_path, [0, 2, 3], seed=1)
    text = PerplexitySpec("appendix", TextSpec(builtin="iterabre-appendix-a"), context=32, max_tokens=200)
    model = ModelRef(source, dropped=(1,)).adapted(adapter)
    specs = [EvaluationSpec(model=model.without((layer,)), perplexity=(text,)) for layer in (0, 3)]
    expected = [evaluate_model(spec) for spec in specs]
    loaded: list[ModelRef] = []
    monkeypatch.setattr(
        layer_sweep, "build_model", lambda ref, over: loaded.append(ref) or build_model(ref, over)
    )
    assert list(evaluate_prunings(specs)) == list(enumerate(expected))
    assert expected[0] != expected[1]
    assert loaded == [model]


def _changed_by_hand(weights: dict[str, Tensor], factors: Factors) -> dict[str, Tensor]:
    changed = {name: weight.clone() for name, weight in weights.items()}
    for name, (a, b) in factors.items():
        changed[f"{name}.weight"] += ALPHA / RANK * (b @ a)
    return changed


def test_rename_layers_moves_kept_layers_and_leaves_out_the_rest() -> None:
    names = [
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.3.mlp.experts.3.up_proj.lora_A.weight",
        "base_model.model.model.layers.11.mlp.up_proj.lora_A.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.embed_tokens.weight",
        "other_model.layers.3.weight",
    ]
    tensors = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    assert rename_layers(tensors, "model.layers", {2: 0, 3: 1, 11: 2}) == {
        "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_A.weight": torch.tensor(1.0),
        "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight": torch.tensor(2.0),
        "model.layers.0.mlp.up_proj.weight": torch.tensor(3.0),
        "model.embed_tokens.weight": torch.tensor(4.0),
        "other_model.layers.3.weight": torch.tensor(5.0),
    }


def test_an_adapter_follows_its_source_layers(tmp_path: Path) -> None:
    """Layers 1 and 2 are dropped; the adapter was trained on 0, 2 and 3."""
    factors, adapter = _llama_adapter(tmp_path, layers=[0, 2, 3], seed=1)
    model, _ = tiny_llama()
    want = _changed_by_hand(model.state_dict(), factors)

    merged = merge_adapters(remove_layers(model, [1, 2]), [adapter], kept=(0, 3)).state_dict()
    assert not [name for name in merged if "lora" in name]
    current_to_source = {"model.layers.0.": "model.layers.0.", "model.layers.1.": "model.layers.3."}
    for name, weight in merged.items():
        source = name
        for current, original in current_to_source.items():
            source = source.replace(current, original) if name.startswith(current) else source
        torch.testing.assert_close(weight, want[source], msg=name)


def test_an_adapter_of_a_model_at_another_path_gives_no_warning(tmp_path: Path) -> None:
    layers = [0, 1, 2]
    settings = {"target_modules": list(TARGETS), "base_model_name_or_path": "package://elsewhere/model.gguf"}
    adapter = _save_adapter(_draw(layers, seed=1), layers, tmp_path, layers_pattern="layers", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merge_adapters(remove_layers(tiny_llama()[0], [3]), [adapter], kept=tuple(layers))


def test_an_adapter_whose_layers_are_all_gone_changes_nothing(tmp_path: Path) -> None:
    _, adapter = _llama_adapter(tmp_path, layers=[1, 2], seed=1)
    pruned = remove_layers(tiny_llama()[0], [1, 2])
    before = {name: weight.clone() for name, weight in pruned.state_dict().items()}
    after = merge_adapters(pruned, [adapter], kept=(0, 3)).state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].equal(before[name]) for name in before)


def test_an_adapter_opens_on_the_source_model_with_plain_peft(tmp_path: Path) -> None:
    factors, adapter = _llama_adapter(tmp_path, layers=[0, 2, 3], seed=1)
    model, _ = tiny_llama()
    want = _changed_by_hand(model.state_dict(), factors)
    merged = PeftModel.from_pretrained(model, adapter.uri).merge_and_unload().state_dict()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, want[name], msg=name)


def test_transposed_weights_of_gpt2(tmp_path: Path) -> None:
    """GPT-2 keeps [inputs, outputs]; layers 3 and 4 are dropped, 5 becomes 3."""
    name = "transformer.h.5.attn.c_attn"
    a, b = torch.randn(RANK, 32), torch.randn(96, RANK)
    targets = {"target_modules": ["attn.c_attn"], "layers_pattern": "h", "fan_in_fan_out": True}
    adapter = _save_adapter({name: (a, b)}, [5], tmp_path, **targets)
    model = tiny_model("gpt2")
    want = model.state_dict()[f"{name}.weight"] + ALPHA / RANK * (b @ a).T
    merged = merge_adapters(remove_layers(model, [3, 4]), [adapter], kept=(0, 1, 2, 5))
    torch.testing.assert_close(merged.transformer.h[3].attn.c_attn.weight, want)


@torch.no_grad()
@pytest.mark.parametrize("dropped", [(), (1,), (0, 2)])
def test_materialize_folds_the_whole_chain(tmp_path: Path, dropped: tuple[int, ...]) -> None:
    path = save_tiny(tmp_path / "model")
    first, first_ref = _llama_adapter(tmp_path / "first", layers=[0, 1, 2, 3], seed=1)
    second, second_ref = _llama_adapter(tmp_path / "second", layers=[1, 3], seed=2)

    source, _ = load_model(path)
    by_hand = _changed_by_hand(_changed_by_hand(source.state_dict(), first), second)
    source.load_state_dict(by_hand)
    with skipped(source, dropped):
        want = source(tiny_ids(), use_cache=False).logits

    ref = ModelRef(ModelSpec(path)).adapted(first_ref).without(dropped).adapted(second_ref)
    model, tokenizer = build_model(ref)
    assert model.config.num_hidden_layers == 4 - len(dropped)
    assert len(tokenizer) == model.config.vocab_size
    torch.testing.assert_close(model(tiny_ids(), use_cache=False).logits, want, atol=1e-4, rtol=1e-4)


def _seven_small_adapters(directory: Path, **settings: object) -> tuple[list[Factors], list[ArtifactRef]]:
    """As a campaign leaves them: each changes a weight by little more than bfloat16 resolves."""
    chain, refs = [], []
    for seed in range(7):
        factors = {
            name: (a, 2e-3 * b)
            for name, (a, b) in _draw([0, 1, 2, 3], seed).items()
            if seed or ".0." not in name
        }
        targets = {"target_modules": list(TARGETS), "layers_pattern": "layers"} | settings
        refs.append(_save_adapter(factors, [0, 1, 2, 3], directory / str(seed), **targets))
        chain.append(factors)
    return chain, refs


def _lost(found: Tensor, source: Tensor, change: Tensor) -> float:
    """Share of a change, in float64, that is missing in the weight that was found."""
    return ((found.double() - source.double() - change).norm() / change.norm()).item()


@pytest.mark.parametrize("dropped", [(), (1,)])
def test_a_chain_is_rounded_once(tmp_path: Path, dropped: tuple[int, ...]) -> None:
    path = save_tiny(tmp_path / "model")
    chain, refs = _seven_small_adapters(tmp_path)
    ref = ModelRef(ModelSpec(path, "bfloat16")).without(dropped)
    for adapter in refs:
        ref = ref.adapted(adapter)
    source = load_model(path, dtype="bfloat16")[0].state_dict()
    found = build_model(ref)[0].state_dict()
    kept = [layer for layer in range(4) if layer not in dropped]
    for position, layer in enumerate(kept):
        for target in TARGETS:
            name = f"model.layers.{layer}.{target}"
            change = torch.zeros(TARGETS[target], dtype=torch.float64)
            for factors in chain:
                if name in factors:
                    a, b = factors[name]
                    change += ALPHA / RANK * (b.double() @ a.double())
            weight = source[f"{name}.weight"]
            best = _lost((weight.double() + change).bfloat16(), weight, change)
            merged = found[f"model.layers.{position}.{target}.weight"]
            assert merged.dtype == torch.bfloat16
            assert _lost(merged, weight, change) <= 1.001 * best


def test_a_streamed_chain_has_the_same_bits(tmp_path: Path) -> None:
    ref = ModelRef(ModelSpec(save_tiny(tmp_path / "model"), "bfloat16"))
    for adapter in _seven_small_adapters(tmp_path)[1]:
        ref = ref.adapted(adapter)
    merged, streamed = build_model(ref)[0], load_streamed(ref, torch.device("cpu"))
    for index in range(4):
        with resident(streamed, index):
            blocks = (streamed.model.layers[index], merged.model.layers[index])
            states = [block.state_dict() for block in blocks]
            assert all(states[0][name].equal(states[1][name]) for name in states[1])


@torch.no_grad()
def test_other_adapters_are_merged_in_float32_too(tmp_path: Path) -> None:
    """Ranks that differ between layers, which PEFT merges: in float32 and rounded once."""
    path = save_tiny(tmp_path / "model")
    patterns = {"alpha_pattern": {"model.layers.2.mlp.down_proj": 2 * ALPHA}}
    chain, refs = _seven_small_adapters(tmp_path, **patterns)
    ref = ModelRef(ModelSpec(path, "bfloat16")).without((0,))
    for adapter in refs:
        ref = ref.adapted(adapter)
    merged = build_model(ref)[0]
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    found, source = merged.state_dict(), load_model(path, dtype="bfloat16")[0].state_dict()
    for layer in (1, 2, 3):
        name = f"model.layers.{layer}.mlp.down_proj"
        scale = (2 if layer == 2 else 1) * ALPHA / RANK
        change = sum(scale * (f[name][1].double() @ f[name][0].double()) for f in chain)
        weight = source[f"{name}.weight"]
        best = _lost((weight.double() + change).bfloat16(), weight, change)
        assert _lost(found[f"model.layers.{layer - 1}.mlp.down_proj.weight"], weight, change) <= 1.001 * best
