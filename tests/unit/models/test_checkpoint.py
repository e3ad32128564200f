"""Odd model directories mean one thing to all that read them: load, stream, prune, describe and plan."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import actors
from actors.contracts import ModelRef, ModelSpec
from actors.errors import RequestError
from actors.models import (
    LayerwisePass,
    describe_model,
    load_model,
    load_streamed,
    load_tokenizer,
    prune_checkpoint,
    resident,
)
from actors.models.loading.checkpoint import INDEX, SINGLE, read_checkpoint
from orchestrator.config import parse_config
from orchestrator.planning.planner import build_plan
from tests.support.tiny_models import save_tiny, skipped, tiny_ids, tiny_llama

LAYERS = 3
DROPPED = 1
DOWN = "model.layers.1.mlp.down_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Change = Callable[[Path], Any]


# What is done to a good directory


def _config(**fields: Any) -> Change:
    """Set fields of config.json; None takes one out."""
    return _json("config.json", fields)


def _json(name: str, fields: dict[str, Any]) -> Change:
    def change(directory: Path) -> None:
        file = directory / name
        held = json.loads(file.read_text()) | fields
        file.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))

    return change


def _text(name: str, text: str | bytes) -> Change:
    def change(directory: Path) -> None:
        (directory / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return change


def _cut(name: str, keep: int) -> Change:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:keep])


def _before(name: str, prefix: bytes) -> Change:
    return lambda directory: (directory / name).write_bytes(prefix + (directory / name).read_bytes())


def _gone(*names: str) -> Change:
    def change(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return change


def _tensors(change: Callable[[dict[str, Tensor]], Any], name: str = SINGLE) -> Change:
    """Write a weight file anew with other tensors in it."""

    def changed(directory: Path) -> None:
        held = load_file(directory / name)
        held = change(held) or held
        save_file({k: v.contiguous() for k, v in held.items()}, directory / name, metadata={"format": "pt"})

    return changed


def _without(name: str) -> Change:
    return _tensors(lambda held: {key: tensor for key, tensor in held.items() if key != name})


def _set(**tensors: Tensor) -> Change:
    return _tensors(lambda held: held.update({k.replace("__", "."): v for k, v in tensors.items()}))


def _header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Write the header of the weight file anew, and leave the bytes of its tensors."""

    def changed(directory: Path) -> None:
        raw = (directory / SINGLE).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        text = json.dumps(change(header) or header).encode()
        (directory / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return changed


def _entry(**fields: Any) -> Change:
    return _header(lambda header: header[DOWN].update(fields))


def _sharded(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / SINGLE).unlink()
    model.save_pretrained(directory, max_shard_size="60KB")


def _index(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Split the weights and change the index."""

    def changed(directory: Path) -> None:
        _sharded(directory)
        index = json.loads((directory / INDEX).read_text())
        change(index)
        (directory / INDEX).write_text(json.dumps(index))

    return changed


def _then(*changes: Change) -> Change:
    def change(directory: Path) -> None:
        for each in changes:
            each(directory)

    return change


def _adapter(directory: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(directory), lora).save_pretrained(directory)


def _other_weights(directory: Path, name: str) -> None:
    """Put the weights of another model beside."""
    other, _ = tiny_llama(LAYERS, seed=1)
    held = {k: v.contiguous() for k, v in other.state_dict().items()}
    save_file(held, directory / name, metadata={"format": "pt"})


def _single_and_shards(directory: Path) -> None:
    _sharded(directory)
    _other_weights(directory, SINGLE)


def _shards_without_index(directory: Path) -> None:
    _sharded(directory)
    (directory / INDEX).unlink()


def _first_shard_gone(directory: Path) -> None:
    _sharded(directory)
    min(directory.glob("model-*.safetensors")).unlink()


def _tensor_in_two_shards(directory: Path) -> None:
    _sharded(directory)
    first, *_, last = sorted(directory.glob("model-*.safetensors"))
    twice = {DOWN: torch.zeros(32, 64)}
    for file in (first, last):
        save_file(load_file(file) | twice, file, metadata={"format": "pt"})


def _links(directory: Path) -> None:
    """Lay the files out as the hub's cache does: links to blobs elsewhere."""
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))


def _link_to_nothing(directory: Path) -> None:
    (directory / SINGLE).unlink()
    (directory / SINGLE).symlink_to("/no/such/blob")


def _backbone(directory: Path) -> None:
    """Drop the first part of the names, as a file of the bare backbone has them."""
    _tensors(lambda held: {name.removeprefix("model."): tensor for name, tensor in held.items()})(directory)


def _classifier(directory: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(directory).save_pretrained(directory)


def _only_head(held: dict[str, Tensor]) -> None:
    held[HEAD] = held.pop(EMBEDDING)


def _copied_head(held: dict[str, Tensor]) -> None:
    held[HEAD] = held[EMBEDDING].clone()


NEWER_TOKENIZER = _json("tokenizer.json", {"model": {"type": "BPENext", "vocab": {"a": 0}, "merges": []}})

READ: dict[str, Change] = {
    "as saved": lambda directory: None,
    "in shards": _sharded,
    "links of a cache": _links,
    "stray weights of another layout": lambda d: _other_weights(d, "consolidated.safetensors"),
    "stray shard that the index does not name": _then(
        _sharded, lambda d: _other_weights(d, "model-00001-of-00009.safetensors")
    ),
    "an index of the single file": lambda d: _text(
        INDEX, json.dumps({"metadata": {}, "weight_map": dict.fromkeys(load_file(d / SINGLE), SINGLE)})
    )(d),
    "adapter weights without their config": _text("adapter_model.safetensors", b"no adapter"),
    "names of the bare backbone": _backbone,
    "weights of two types": _tensors(lambda held: held.update({DOWN: held[DOWN].double()})),
    "buffers of an older version": _set(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
    "a vision tower": _set(vision_tower__patch__weight=torch.ones(3)),
    "a directory that is named like a file": lambda d: (d / "other.json").mkdir(),
}
"""Directories of the same weights, all of them readable."""

READ_TIED: dict[str, Change] = {
    "tied, head left out": lambda directory: None,
    "tied, head stored again": _tensors(_copied_head),
    "tied, only the head stored": _tensors(_only_head),
}

REFUSED: dict[str, tuple[Change, str]] = {
    "adapter": (_adapter, "adapter_config.json"),
    "no config": (_gone("config.json"), "has no config.json"),
    "no weights": (_gone(SINGLE), r"has no \*\.safetensors"),
    "weights of another layout alone": (
        lambda d: (d / SINGLE).rename(d / "consolidated.safetensors"),
        "'consolidated.safetensors' would count",
    ),
    "single file and shards": (_single_and_shards, f"both '{SINGLE}' and '{INDEX}'"),
    "single file and shards without index": (
        lambda d: _other_weights(d, "model-00001-of-00002.safetensors"),
        f"both '{SINGLE}' and 'model-00001-of-00002.safetensors'",
    ),
    "shards without index": (_shards_without_index, INDEX),
    "shard missing": (_first_shard_gone, r"lacks 'model-00001-of-\d+\.safetensors'"),
    "link to nothing": (_link_to_nothing, "is a link to a file that is gone"),
    "index of other tensors": (
        _index(lambda index: index["weight_map"].update(ghost=index["weight_map"][DOWN])),
        "'ghost'",
    ),
    "index that lacks a tensor": (_index(lambda index: index["weight_map"].pop(DOWN)), re.escape(DOWN)),
    "index with the wrong shard": (
        _index(lambda index: index["weight_map"].update({DOWN: index["weight_map"][EMBEDDING]})),
        re.escape(DOWN),
    ),
    "index out of the directory": (
        _index(lambda index: index["weight_map"].update({DOWN: "../x.safetensors"})),
        r"\.\./x\.safetensors",
    ),
    "index without metadata": (_index(lambda index: index.pop("metadata")), INDEX),
    "index cut off": (_then(_sharded, _cut(INDEX, 60)), INDEX),
    "index that is a list": (_then(_sharded, _text(INDEX, "[]")), INDEX),
    "index with a byte order mark": (_then(_sharded, _before(INDEX, b"\xef\xbb\xbf")), INDEX),
    "tensor in two shards": (_tensor_in_two_shards, re.escape(DOWN)),
    "file of no bytes": (_text(SINGLE, b""), "it is empty"),
    "git-lfs pointer": (
        _text(SINGLE, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "git lfs pull",
    ),
    "file cut off in its tensors": (_cut(SINGLE, 150_000), "is cut off"),
    "file cut off in its header": (_cut(SINGLE, 100), "no safetensors file"),
    "bytes after the last tensor": (
        lambda d: (d / SINGLE).write_bytes((d / SINGLE).read_bytes() + b"12345678"),
        "8 bytes follow",
    ),
    "header that is no JSON": (_text(SINGLE, struct.pack("<Q", 8) + b"not json"), "no safetensors file"),
    "header that is a list": (_text(SINGLE, struct.pack("<Q", 2) + b"[]"), "no safetensors file"),
    "tensors that overlap": (_entry(data_offsets=[0, 8192]), "overlap"),
    "shape of other bytes": (_entry(shape=[32, 63]), re.escape(DOWN)),
    "shape below zero": (_entry(shape=[-32, -64]), re.escape(DOWN)),
    "unknown type of numbers": (_entry(dtype="F7"), "'F7'"),
    "offsets missing": (_header(lambda header: header[DOWN].pop("data_offsets") and None), re.escape(DOWN)),
    "metadata that is no text": (
        _header(lambda header: header.update(__metadata__={"a": 1})),
        "__metadata__",
    ),
    "tensors without elements": (_set(**{DOWN.replace(".", "__"): torch.empty(0)}), rf"{DOWN}.*shape \[0\]"),
    "another shape than the config's": (
        _config(intermediate_size=65),
        r"mlp\.\w+_proj\.weight.*config",
    ),
    "more words than rows": (_config(vocab_size=310), r"shape \[300, 32\].*shape \[310, 32\]"),
    "a weight of a layer missing": (_without(DOWN), re.escape(DOWN)),
    "embedding missing": (_without(EMBEDDING), EMBEDDING),
    "norm missing": (_without("model.norm.weight"), "model.norm.weight"),
    "head of an untied model missing": (_without(HEAD), HEAD),
    "more layers in the file": (_config(num_hidden_layers=2), r"model\.layers\.2\..*num_hidden_layers 2"),
    "fewer layers in the file": (_config(num_hidden_layers=4), r"model\.layers\.3\."),
    "layers without number": (_config(num_hidden_layers=10**30), "num_hidden_layers"),
    "no layers": (_config(num_hidden_layers=0), "num_hidden_layers 0"),
    "bias that the config does not know": (
        _set(model__layers__0__self_attn__q_proj__bias=torch.ones(32)),
        r"model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "the same weight under two names": (
        _tensors(lambda held: held.update({DOWN.removeprefix("model."): held[DOWN].clone()})),
        re.escape(DOWN),
    ),
    "weights as bytes": (
        _tensors(lambda held: held.update({DOWN: held[DOWN].to(torch.int8)})),
        rf"{re.escape(DOWN)}.*I8.*quantised",
    ),
    "weights in eight bits": (
        _tensors(lambda held: held.update({DOWN: held[DOWN].to(torch.float8_e4m3fn)})),
        rf"{re.escape(DOWN)}.*F8_E4M3.*quantised",
    ),
    "quantised by GPTQ": (
        _config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config",
    ),
    "quantised by bitsandbytes": (
        _config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantization_config",
    ),
    "quantised in a way unknown": (_config(quantization_config={}), "quantization_config"),
    "quantised by a number": (_config(quantization_config=3), "config.json|quantization_config"),
    "weights of another name": (_config(transformers_weights="x.safetensors"), "transformers_weights"),
    "classifier": (_classifier, "LlamaForSequenceClassification"),
    "config cut off": (_cut("config.json", 50), "config.json"),
    "config that is a list": (_text("config.json", "[]"), "config.json"),
    "config that is null": (_text("config.json", "null"), "config.json"),
    "config with a byte order mark": (_before("config.json", b"\xef\xbb\xbf"), "config.json"),
    "config in another encoding": (_before("config.json", b"\xff\xfe"), "config.json"),
    "unknown family": (_config(model_type="no_such_family"), "no_such_family"),
    "family that is a list": (_config(model_type=[]), "config.json"),
    "layers in words": (_config(num_hidden_layers="3"), "num_hidden_layers"),
    "no heads": (_config(num_attention_heads=0), "config.json"),
    "heads that do not divide": (_config(num_attention_heads=3), "number of attention heads"),
    "unknown activation": (_config(hidden_act="nope"), "config.json.*nope"),
    "unknown rotary embedding": (_config(rope_parameters={"rope_type": "nope"}), "config.json.*nope"),
    "width without number": (_config(hidden_size=10**30), "config.json"),
    "kernels that are not here": (_config(attn_implementation="flash_attention_2"), "config.json"),
    "padding beyond the embedding": (_config(pad_token_id=9999), "config.json"),
    "tokenizer of another version": (
        NEWER_TOKENIZER,
        r"tokenizer\.json.*install another version of tokenizers",
    ),
    "tokenizer cut off": (_cut("tokenizer.json", 500), r"tokenizer\.json.*another version of tokenizers"),
    "tokenizer settings cut off": (_cut("tokenizer_config.json", 20), r"tokenizer_config\.json"),
    "no tokenizer": (_gone("tokenizer.json"), r"tokenizer\.json"),
    "tokenizer of a class without its file": (
        _then(_json("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}), _gone("tokenizer.json")),
        r"tokenizer\.json",
    ),
}
"""Directories that no reader may take, with what its message has to name."""

REFUSED_TIED: dict[str, tuple[Change, str]] = {
    "tied, another head stored": (
        _tensors(lambda held: held.update({HEAD: held[EMBEDDING] + 1})),
        rf"{HEAD}.*tie_word_embeddings",
    ),
    "tied, head of another type": (
        _tensors(lambda held: held.update({HEAD: held[EMBEDDING].bfloat16()})),
        rf"{HEAD}.*tie_word_embeddings",
    ),
}


# The five readers. Each returns numbers, or raises RequestError.


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog .\n" * 20)
    return file


@torch.no_grad()
def _load(path: Path) -> Tensor:
    return load_model(str(path))[0](tiny_ids(), use_cache=False).logits


@torch.no_grad()
def _stream(path: Path) -> Tensor:
    load_tokenizer(ModelSpec(str(path)))  # as scoring does first
    model, layerwise = load_streamed(ModelRef(ModelSpec(str(path))), torch.device("cpu")), None
    hidden = torch.empty(0)
    for index in range(LAYERS):
        with resident(model, index):
            layerwise = layerwise or LayerwisePass(model, tiny_ids())
            hidden = layerwise.block(index, layerwise.hidden_BTD if index == 0 else hidden)
    assert layerwise is not None
    return model.lm_head(layerwise.finish(hidden))


@torch.no_grad()
def _prune(path: Path) -> Tensor:
    output = path.parent / "pruned"
    try:
        prune_checkpoint(str(path), [DROPPED], output)
    except RequestError:
        assert not output.exists()
        raise
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    return model(tiny_ids(), use_cache=False).logits


def _describe(path: Path) -> Tensor:
    info = describe_model(ModelSpec(str(path)))
    return torch.tensor([info.num_layers, info.num_parameters, info.vocab_size])


def _plan(path: Path, text: Path) -> Tensor:
    method = {
        "name": "m",
        "scoring": {"calibration": {"path": str(text)}},
        "recovery": {"objective": "none"},
    }
    campaign = {
        "name": "odd",
        "models": [{"id": "odd", "path": str(path)}],
        "methods": [method],
        "targets": [{"layers": LAYERS - 1}],
        "evaluation": {"perplexity": [{"name": "t", "data": {"path": str(text)}, "context": 32}]},
        "execution": {"backend": "local"},
        "storage": {"path": str(path.parent / "runs")},
    }
    (trajectory,) = build_plan(parse_config(campaign, "campaign.yaml")).trajectories
    info = trajectory.model
    return torch.tensor([info.num_layers, info.num_parameters, info.vocab_size])


def _readers(text: Path) -> dict[str, Callable[[Path], Tensor]]:
    return {
        "load": _load,
        "stream": _stream,
        "prune": _prune,
        "describe": _describe,
        "plan": lambda path: _plan(path, text),
    }


def _made(tmp_path: Path, change: Change, **overrides: Any) -> Path:
    # A name as people give them.
    directory = tmp_path / "mon modèle 1"
    save_tiny(directory, LAYERS, **overrides)
    change(directory)
    return directory


@torch.no_grad()
def _truth(model: PreTrainedModel) -> dict[str, Tensor]:
    """What the model that was saved computes, without any file."""
    whole = model(tiny_ids(), use_cache=False).logits
    with skipped(model, [DROPPED]):
        pruned = model(tiny_ids(), use_cache=False).logits
    size = torch.tensor([LAYERS, sum(p.numel() for p in model.parameters()), model.config.vocab_size])
    return {"load": whole, "stream": whole, "prune": pruned, "describe": size, "plan": size}


def _check_read(directory: Path, model: PreTrainedModel, text: Path) -> None:
    truth = _truth(model)
    for name, read in _readers(text).items():
        torch.testing.assert_close(
            read(directory), truth[name], msg=lambda said, name=name: f"{name}: {said}"
        )


def _check_refused(directory: Path, message: str, text: Path) -> None:
    for name, read in _readers(text).items():
        with pytest.raises(RequestError) as refused:
            pytest.fail(f"{name} gives {read(directory).flatten()[:3]}")
        assert re.search(message, str(refused.value)), f"{name}: {refused.value}"
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("case", READ)
def test_every_reader_reads_the_same(case: str, tmp_path: Path, texts: Path) -> None:
    _check_read(_made(tmp_path, READ[case]), tiny_llama(LAYERS)[0], texts)


@pytest.mark.parametrize("case", READ_TIED)
def test_every_reader_ties_the_same(case: str, tmp_path: Path, texts: Path) -> None:
    directory = _made(tmp_path, READ_TIED[case], tie_word_embeddings=True)
    _check_read(directory, tiny_llama(LAYERS, tie_word_embeddings=True)[0], texts)


@pytest.mark.parametrize("case", REFUSED)
def test_every_reader_refuses(case: str, tmp_path: Path, texts: Path) -> None:
    change, message = REFUSED[case]
    _check_refused(_made(tmp_path, change), message, texts)


@pytest.mark.parametrize("case", REFUSED_TIED)
def test_every_reader_refuses_two_heads(case: str, tmp_path: Path, texts: Path) -> None:
    change, message = REFUSED_TIED[case]
    _check_refused(_made(tmp_path, change, tie_word_embeddings=True), message, texts)


def test_a_read_only_directory_is_read(tmp_path: Path, texts: Path) -> None:
    directory = _made(tmp_path, lambda d: None)
    for file in directory.iterdir():
        file.chmod(0o444)
    directory.chmod(0o555)
    try:
        _check_read(directory, tiny_llama(LAYERS)[0], texts)
    finally:
        directory.chmod(0o755)


def test_headers_are_those_of_the_library(tmp_path: Path) -> None:
    directory = Path(save_tiny(tmp_path, LAYERS))
    want = load_file(directory / SINGLE)
    got = read_checkpoint(directory).tensors
    assert got.keys() == want.keys()
    assert all(tensor.read().equal(want[name]) for name, tensor in got.items())


def test_one_place_decides_which_weight_files_count() -> None:
    """No other module looks for weight files, or reads or writes their headers.

    What a teacher said and what the unpruned model gives lie in files of their own.
    """
    root = Path(actors.__file__).parent.parent
    files = ("models/loading/checkpoint.py", "data/teacher_states.py", "scoring/measures/reference.py")
    own = {root / "actors" / file for file in files}
    readers = re.compile(r"glob\([^)]*safetensors|safe_open|index\.json|(from|to)_bytes\(|data_offsets\"")
    found = {
        file.relative_to(root).as_posix(): match[0]
        for package in ("actors", "orchestrator")
        for file in sorted((root / package).rglob("*.py"))
        if file not in own and (match := readers.search(file.read_text(encoding="utf-8")))
    }
    assert found == {}
