"""Pruning a checkpoint on disk equals pruning it in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from actors.errors import RequestError
from actors.models import load_model, prune_checkpoint, remove_layers, save_pretrained
from actors.models.loading.checkpoint import INDEX, read_checkpoint, read_header
from tests.support.decoder_zoo import tiny_decoder_config
from tests.support.tiny_models import tiny_ids, tiny_model, tiny_tokenizer

FAMILIES = ["llama", "gpt2", "mixtral", "gemma2", "smollm3"]


def _save(family: str, directory: Path, shard_size: str = "40KB", **overrides: object) -> str:
    tiny_model(family, **overrides).save_pretrained(directory, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in read_checkpoint(directory).files for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("shard_size", ["40KB", "1GB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_on_disk_equals_pruned_in_memory(family: str, shard_size: str, tmp_path: Path) -> None:
    source = _save(family, tmp_path / "source", shard_size)
    model, tokenizer = load_model(source)
    save_pretrained(remove_layers(model, [1, 4]), tmp_path / "memory", tokenizer=tokenizer)

    assert prune_checkpoint(source, [1, 4], tmp_path / "disk") == (4, model.num_parameters())
    got, want = _tensors(tmp_path / "disk"), _tensors(tmp_path / "memory")
    assert got.keys() == want.keys()
    assert all(got[name].equal(want[name]) for name in want)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "disk" / name).read_text()) == json.loads(
            (tmp_path / "memory" / name).read_text()
        )
    assert len(AutoTokenizer.from_pretrained(tmp_path / "disk")) == len(tokenizer)
    assert (tmp_path / "disk" / INDEX).is_file() == (shard_size == "40KB")


@torch.no_grad()
def test_it_opens_in_plain_transformers(tmp_path: Path) -> None:
    source = _save("llama", tmp_path / "source")
    prune_checkpoint(source, [0, 5], tmp_path / "disk")
    want = remove_layers(tiny_model("llama"), [0, 5])(tiny_ids()).logits
    opened, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "disk", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    torch.testing.assert_close(opened(tiny_ids()).logits, want)


def test_weights_are_converted_when_asked(tmp_path: Path) -> None:
    source = _save("llama", tmp_path / "source")
    prune_checkpoint(source, [2], tmp_path / "disk", dtype="bfloat16")
    want = remove_layers(tiny_model("llama"), [2]).to(torch.bfloat16).state_dict()
    got = _tensors(tmp_path / "disk")
    assert all(got[name].dtype == torch.bfloat16 and got[name].equal(want[name]) for name in got)
    assert json.loads((tmp_path / "disk/config.json").read_text())["dtype"] == "bfloat16"


def test_weights_are_kept_as_stored(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    prune_checkpoint(str(tmp_path / "source"), [2], tmp_path / "disk")
    assert {tensor.dtype for tensor in _tensors(tmp_path / "disk").values()} == {torch.bfloat16}


def test_a_decoder_among_other_parts_is_written_as_stored(tmp_path: Path) -> None:
    """Read as a whole, as its files hold an image encoder, too; the norms are stored in float32."""
    config = tiny_decoder_config("qwen3_5")
    config.vision_config.depth = 1
    model = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    prune_checkpoint(str(tmp_path / "source"), [1], tmp_path / "disk")
    written = _tensors(tmp_path / "disk")
    assert {tensor.dtype for name, tensor in written.items() if "norm" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in written.items() if "norm" not in name} == {torch.bfloat16}
    prune_checkpoint(str(tmp_path / "source"), [1], tmp_path / "half", dtype="float16")
    assert {tensor.dtype for tensor in _tensors(tmp_path / "half").values()} == {torch.float16}


def test_names_without_the_models_own_prefix(tmp_path: Path) -> None:
    """The first GPT-2 files say `h.0`, not `transformer.h.0`."""
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    prune_checkpoint(str(tmp_path / "source"), [0, 3], tmp_path / "disk")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "disk").eval()
    want = remove_layers(model, [0, 3])
    torch.testing.assert_close(opened(tiny_ids()).logits, want(tiny_ids()).logits)


def test_what_cannot_be_said_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    source = _save("qwen3_moe", tmp_path / "source", decoder_sparse_step=2, mlp_only_layers=[])
    with pytest.raises(RequestError, match="decoder_sparse_step=2"):
        prune_checkpoint(source, [1], tmp_path / "disk")
    assert not (tmp_path / "disk").exists()


def test_a_missing_shard_is_reported(tmp_path: Path) -> None:
    source = _save("llama", tmp_path / "source")
    gone = read_checkpoint(Path(source)).files[1]
    gone.unlink()
    with pytest.raises(RequestError, match=gone.name):
        prune_checkpoint(source, [1], tmp_path / "disk")


@pytest.mark.parametrize(("size", "message"), [(-100, "cut off"), (20, "no safetensors file")])
def test_a_file_cut_off_is_reported(size: int, message: str, tmp_path: Path) -> None:
    file = read_checkpoint(Path(_save("llama", tmp_path / "source"))).files[0]
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(RequestError, match=message):
        read_header(file)


MEASURED = """
import resource, sys
from actors.models import prune_checkpoint
prune_checkpoint(sys.argv[1], [0], sys.argv[2])  # the small one: what Python and the libraries need
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prune_checkpoint(sys.argv[3], [3, 4, 11], sys.argv[4])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def _save_large(directory: Path, shard_bytes: int) -> int:
    """A Llama of zeros in shards of about `shard_bytes`, written shard by shard; returns its bytes."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, vocab_size=300, head_dim=64
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in model.state_dict().items():
        if sum(t.numel() * 2 for t in shards[-1].values()) > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards):
        zeros = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in shard.items()}
        save_file(zeros, directory / f"{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, f"{number}.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


@pytest.mark.long
def test_memory_stays_below_one_shard(tmp_path: Path) -> None:
    shard_bytes = 300 << 20
    size = _save_large(tmp_path / "large", shard_bytes)
    assert size > 2e9
    arguments = [
        _save("llama", tmp_path / "small"),
        *map(str, (tmp_path / "1", tmp_path / "large", tmp_path / "2")),
    ]
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True
    )
    grown_bytes = int(run.stdout.split()[-1]) * 1024
    print(f"checkpoint {size / 1e9:.2f} GB, memory grew by {grown_bytes / 1e6:.0f} MB")
    assert grown_bytes < shard_bytes
