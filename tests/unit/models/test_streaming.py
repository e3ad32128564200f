"""A streamed model computes what the loaded one does, and reads each of its bytes once."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from actors.contracts import ModelRef, ModelSpec
from actors.errors import RequestError
from actors.models import LayerwisePass, depth, find_layers, load_model, load_streamed, resident
from actors.models.loading.checkpoint import read_checkpoint
from tests.support.tiny_models import save_tiny, tiny_ids, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def _saved(family: str, directory: Path, **options: object) -> str:
    tiny_model(family).save_pretrained(directory, **options)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


STREAMED = ["llama", "gpt2", "gemma3_text", "bloom", "smollm3", "mixtral", "qwen3_moe"]
"""The last two have experts that are apart in the file and joined when loaded; Mixtral also renames some."""


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", STREAMED)
def test_streamed_equals_loaded(family: str, dtype: str, tmp_path: Path) -> None:
    path = _saved(family, tmp_path, max_shard_size="100KB")
    spec, ids = ModelSpec(path, dtype), tiny_ids()
    model, streamed = load_model(path, dtype=dtype)[0], load_streamed(ModelRef(spec), CPU)
    want = model.base_model(ids, use_cache=False).last_hidden_state
    hidden, layerwise = torch.empty(0), None
    for index in range(depth(model.config)):
        with resident(streamed, index):
            layerwise = layerwise or LayerwisePass(streamed, ids)
            hidden = layerwise.block(index, layerwise.hidden_BTD if index == 0 else hidden)
    assert layerwise is not None
    torch.testing.assert_close(layerwise.finish(hidden), want)
    tokens_K = torch.tensor([3, 7])
    torch.testing.assert_close(
        layerwise.logits(hidden, tokens_K), model(ids, use_cache=False).logits[:, tokens_K]
    )


def test_blocks_are_read_once_and_only_two_are_there(tmp_path: Path) -> None:
    model = load_streamed(ModelRef(ModelSpec(save_tiny(tmp_path, num_layers=6))), CPU)
    blocks = find_layers(model).modules

    def present() -> list[int]:
        return [i for i, block in enumerate(blocks) if not any(p.is_meta for p in block.parameters())]

    assert present() == []
    for index in range(6):
        with resident(model, index):
            assert present() == [index]
    assert present() == []
    of_blocks = [t for name, t in read_checkpoint(tmp_path).tensors.items() if ".layers." in name]
    assert model.layer_stream.bytes_read == sum(t.num_bytes for t in of_blocks)


def test_tensors_are_read_as_stored(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    model, _ = load_model(str(tmp_path))
    weights = model.state_dict()
    stored = read_checkpoint(tmp_path).tensors
    assert len(stored) >= 4 * 9
    for name, tensor in stored.items():
        assert tensor.read().equal(weights[name])


def _read_all(model: PreTrainedModel) -> None:
    for index in range(depth(model.config)):
        with resident(model, index):
            pass


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model = load_streamed(ModelRef(ModelSpec(save_tiny(tmp_path))), CPU)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50_000])
    with pytest.raises(RequestError, match="ends too early"):
        _read_all(model)


@pytest.mark.parametrize("family", STREAMED)
def test_every_weight_is_the_loaded_one(family: str, tmp_path: Path) -> None:
    """Of a pruned model, too; experts by their numbers, of which there are more than ten."""
    many = {"mixtral": {"num_local_experts": 12}, "qwen3_moe": {"num_experts": 12}}.get(family, {})
    tiny_model(family, **many).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    want = load_model(str(tmp_path))[0].state_dict()
    path = find_layers(load_model(str(tmp_path))[0]).path
    streamed = load_streamed(ModelRef(ModelSpec(str(tmp_path))).without((1, 2)), CPU)
    for index, source in enumerate((0, 3, 4, 5)):
        with resident(streamed, index):
            found = find_layers(streamed).modules[index].state_dict()
            for name, tensor in found.items():
                assert tensor.equal(want[f"{path}.{source}.{name}"]), name
    outside = {name: tensor for name, tensor in streamed.state_dict().items() if path not in name}
    assert all(tensor.equal(want[name]) for name, tensor in outside.items())
    read = {name: t for name, t in read_checkpoint(tmp_path).tensors.items() if ".layers." in name}
    kept = [t.num_bytes for name, t in read.items() if not any(f".layers.{i}." in name for i in (1, 2))]
    assert streamed.layer_stream.bytes_read == sum(kept) or not read


def test_files_that_lack_what_a_block_needs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if no rule joined Mixtral's experts."""
    path = _saved("mixtral", tmp_path)
    monkeypatch.setattr("actors.models.loading.conversion.get_model_conversion_mapping", lambda _model: [])
    with pytest.raises(RequestError, match=r"no weight 'model\.layers\.0.*scoring\.stream_weights to false"):
        load_streamed(ModelRef(ModelSpec(path)), CPU)
