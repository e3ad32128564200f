"""Exported directories open with plain transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.contracts import ExportSpec, ModelRef, ModelSpec
from actors.models import export_model, load_model, prune_checkpoint, remove_layers, save_pretrained
from tests.support.tiny_models import save_tiny, skipped, tiny_ids, tiny_llama, tiny_model, tiny_tokenizer

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
def test_an_export_is_a_directory_of_transformers(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    source, tokenizer = tiny_llama()
    with skipped(source, [0, 3]):
        want = source(tiny_ids(), use_cache=False).logits
    removed = sum(p.numel() for i in (0, 3) for p in source.model.layers[i].parameters())

    spec = ExportSpec(ModelRef(ModelSpec(path), dropped=(0, 3)))
    result = export_model(spec, str(tmp_path / "export"))

    export = tmp_path / "export"
    assert result.num_layers == 2
    assert result.num_parameters == sum(p.numel() for p in source.parameters()) - removed
    assert {file.name for file in result.artifact.files} == {file.name for file in export.iterdir()}
    opened = AutoModelForCausalLM.from_pretrained(export)
    torch.testing.assert_close(opened(tiny_ids()).logits, want)
    assert AutoTokenizer.from_pretrained(export)(SENTENCE).input_ids == tokenizer(SENTENCE).input_ids


WAYS = ("export", "prune", "api")


def _pruned(
    way: str, source: Path, output: Path, layers: tuple[int, ...] = (1,), trust: bool = False
) -> Path:
    """The directory that each way of writing a pruned model leaves."""
    if way == "prune":
        prune_checkpoint(str(source), layers, output, trust_remote_code=trust)
    elif way == "api":
        model, tokenizer = load_model(str(source), trust_remote_code=trust)
        save_pretrained(remove_layers(model, layers), output, tokenizer=tokenizer)
    else:
        ref = ModelRef(ModelSpec(str(source), trust_remote_code=trust), dropped=layers)
        export_model(ExportSpec(ref), str(output))
    return output


def _edit(file: Path, **fields: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    held = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in held.items() if value is not None}))


def _as_4_wrote_it(directory: Path) -> None:
    _edit(
        directory / "config.json",
        rope_parameters=None,
        dtype=None,
        rope_theta=500000.0,
        torch_dtype="float32",
        transformers_version="4.51.0",
    )
    _edit(
        directory / "tokenizer_config.json",
        backend=None,
        is_local=None,
        tokenizer_class="PreTrainedTokenizerFast",
        chat_template="{{ messages }}",
    )


@pytest.mark.parametrize("way", WAYS)
def test_the_files_of_the_source_are_kept_byte_for_byte(way: str, tmp_path: Path) -> None:
    source = Path(save_tiny(tmp_path / "model"))
    _as_4_wrote_it(source)
    # transformers reads both, but refuses to write the one and writes the other as a file of its own.
    _edit(source / "generation_config.json", do_sample=False, temperature=0.9, top_p=0.6)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (source / "special_tokens_map.json").write_text('{"eos_token":   "</s>"}')

    output = _pruned(way, source, tmp_path / "out")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "additional_chat_templates/tool_use.jinja",
    ):
        assert (output / name).read_bytes() == (source / name).read_bytes(), name
    assert not (output / "chat_template.jinja").exists()
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, output))
    assert after == before | {"num_hidden_layers": 3}
    assert list(after) == list(before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trust", [False, True])
def test_code_goes_along_if_it_may_run_and_is_else_not_named(way: str, trust: bool, tmp_path: Path) -> None:
    source = Path(save_tiny(tmp_path / "model"))
    (source / "configuration_x.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass XConfig(LlamaConfig):\n    pass\n"
    )
    (source / "modeling_x.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_x import XConfig\n\n\n"
        "class XForCausalLM(LlamaForCausalLM):\n    config_class = XConfig\n"
    )
    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    _edit(source / "config.json", auto_map=code)

    output = _pruned(way, source, tmp_path / "out", trust=trust)
    shutil.rmtree(source)
    assert json.loads((output / "config.json").read_text()).get("auto_map") == (code if trust else None)
    assert sorted(file.name for file in output.glob("*.py")) == (
        ["configuration_x.py", "modeling_x.py"] if trust else []
    )
    for may_run in (False, True) if not trust else (True,):
        opened = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=may_run)
        assert type(opened).__name__ == ("XForCausalLM" if trust else "LlamaForCausalLM")


@pytest.mark.parametrize("way", WAYS)
def test_a_tokenizer_that_transformers_5_wrote_is_one_for_4(way: str, tmp_path: Path) -> None:
    source = Path(save_tiny(tmp_path / "model"))
    _edit(
        source / "tokenizer_config.json",
        tokenizer_class="TokenizersBackend",
        is_local=True,
        extra_special_tokens=["<pad>", "<s>"],
    )
    output = _pruned(way, source, tmp_path / "out")
    written = json.loads((output / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<pad>", "<s>"]
    assert not {"is_local", "backend", "extra_special_tokens"} & written.keys()
    opened, was = AutoTokenizer.from_pretrained(output), AutoTokenizer.from_pretrained(source)
    assert opened(SENTENCE).input_ids == was(SENTENCE).input_ids
    assert opened.extra_special_tokens == was.extra_special_tokens == ["<pad>", "<s>"]


def test_a_tokenizer_that_was_changed_is_written_as_it_is(tmp_path: Path) -> None:
    model, tokenizer = load_model(save_tiny(tmp_path / "model"))
    tokenizer.add_tokens(["<tool>"])
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.max_new_tokens = 7
    save_pretrained(model, tmp_path / "out", tokenizer=tokenizer)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == opened.config.vocab_size == len(tokenizer)
    assert opened.generation_config.max_new_tokens == 7


@pytest.mark.parametrize("way", ["export", "prune"])
def test_the_type_is_changed_with_that_of_the_weights(way: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_llama()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    _edit(
        tmp_path / "model" / "config.json", dtype=None, torch_dtype="bfloat16", transformers_version="4.51.0"
    )
    output = _pruned(way, tmp_path / "model", tmp_path / "out")
    config = json.loads((output / "config.json").read_text())
    stored = {str(tensor.dtype) for tensor in load_file(output / "model.safetensors").values()}
    assert stored == {f"torch.{config['torch_dtype']}"}
    assert config["torch_dtype"] == ("float32" if way == "export" else "bfloat16")
    assert "dtype" not in config


@pytest.mark.parametrize("way", WAYS)
def test_layers_of_multi_token_prediction_are_neither_kept_nor_counted(way: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny_model("glm4_moe", first_k_dense_replace=6, head_dim=8, num_nextn_predict_layers=1).save_pretrained(
        source
    )
    tiny_tokenizer().save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    beyond = {
        name.replace(".layers.5.", ".layers.6."): tensor.clone()
        for name, tensor in weights.items()
        if ".layers.5." in name
    } | {"mtp.norm.weight": torch.ones(32)}
    save_file(weights | beyond, source / "model.safetensors", metadata={"format": "pt"})
    output = _pruned(way, source, tmp_path / "out", (2,))
    assert json.loads((output / "config.json").read_text())["num_nextn_predict_layers"] == 0
    names = load_file(output / "model.safetensors").keys()
    assert names == {name for name in weights if ".layers.5." not in name}


@pytest.mark.parametrize("way", WAYS)
def test_windows_that_move_are_reported(way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 2 has a window in every other layer, and llama.cpp counts them by itself."""
    tiny_model("gemma2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    _pruned(way, tmp_path / "model", tmp_path / "even", (0, 1))
    assert "llama.cpp" not in caplog.text
    _pruned(way, tmp_path / "model", tmp_path / "odd", (1,))
    assert "layer_types" in caplog.text
    assert "llama.cpp" in caplog.text
