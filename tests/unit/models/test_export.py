"""Exported directories open with plain transformers."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.contracts import ExportSpec, ModelRef, ModelSpec
from actors.models import export_model, remove_layers, save_pretrained
from tests.tiny_models import save_tiny, skipped, tiny_ids, tiny_llama

SENTENCE = "Stability of the higher layer leads to stability ."


@torch.no_grad()
def test_a_saved_model_opens_in_plain_transformers(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama()
    with skipped(model, [1]):
        want = model(tiny_ids(), use_cache=False).logits
    save_pretrained(remove_layers(model, [1]), tmp_path, tokenizer=tokenizer)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(tiny_ids()).logits, want)
    assert AutoTokenizer.from_pretrained(tmp_path)(SENTENCE).input_ids == tokenizer(SENTENCE).input_ids
    assert (tmp_path / "generation_config.json").is_file()
    assert list(tmp_path.glob("*.safetensors"))


def test_a_model_that_came_from_gguf_is_saved_as_an_ordinary_one(tmp_path: Path) -> None:
    model, _ = tiny_llama()
    model.config.quantization_config = {"quant_method": "gguf"}
    save_pretrained(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_an_export_holds_model_card_and_provenance(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    source, tokenizer = tiny_llama()
    with skipped(source, [0, 3]):
        want = source(tiny_ids(), use_cache=False).logits
    removed = sum(p.numel() for i in (0, 3) for p in source.model.layers[i].parameters())

    card, provenance = "# A smaller model\n\n0 → 3\n", '{"dropped": [0, 3]}'
    spec = ExportSpec(ModelRef(ModelSpec(path), dropped=(0, 3)), card, provenance)
    result = export_model(spec, str(tmp_path / "export"))

    export = tmp_path / "export"
    assert result.num_layers == 2
    assert result.num_parameters == sum(p.numel() for p in source.parameters()) - removed
    assert {file.name for file in result.artifact.files} == {file.name for file in export.iterdir()}
    assert (export / "README.md").read_text(encoding="utf-8") == card
    assert (export / "iterabre.json").read_text(encoding="utf-8") == provenance
    opened = AutoModelForCausalLM.from_pretrained(export)
    torch.testing.assert_close(opened(tiny_ids()).logits, want)
    assert AutoTokenizer.from_pretrained(export)(SENTENCE).input_ids == tokenizer(SENTENCE).input_ids
