"""GGUF files: what becomes of a small one, and how often it is parsed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from actors.contracts import ModelSpec, Origin
from actors.models.loading.gguf_file import converted
from actors.models.loading.licence import origin
from tests.support.tiny_models import tiny_llama, tiny_tokenizer

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, str]]:
    """Return the parameters' names here and in GGUF."""
    yield "model.embed_tokens", "token_embd"
    yield "model.norm", "output_norm"
    yield "lm_head", "output"
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            yield f"model.layers.{layer}.{ours}", f"blk.{layer}.{theirs}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A tiny llama in a GGUF file that says where it comes from."""
    model, _ = tiny_llama()
    config, vocabulary = model.config, tiny_tokenizer().get_vocab()
    writer = GGUFWriter(tmp_path / "fox.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/den/fox")
    writer.add_name("fox")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    weights = model.state_dict()
    for ours, theirs in _tensors(model):
        writer.add_tensor(f"{theirs}.weight", weights[f"{ours}.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "fox.gguf"


def test_a_gguf_file_is_parsed_once_and_says_its_licence(
    file: Path, session_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    parse = GGUFReader.__init__

    def counting(reader: GGUFReader, *args: object) -> None:
        parsed.append(args)
        parse(reader, *args)

    monkeypatch.setattr(GGUFReader, "__init__", counting)
    directory = converted(file)
    assert session_cache in directory.parents
    assert origin(ModelSpec(str(file))) == Origin("den/fox", "apache-2.0")
    assert len(parsed) == 1

    model = AutoModelForCausalLM.from_pretrained(directory)
    want, _ = tiny_llama()
    for ours in ("model.embed_tokens", "model.layers.3.mlp.down_proj", "lm_head"):
        assert model.state_dict()[f"{ours}.weight"].equal(want.state_dict()[f"{ours}.weight"]), ours


def test_a_converted_tokenizer_does_not_say_whether_the_machine_was_offline(
    file: Path, session_cache: Path
) -> None:
    settings = json.loads((converted(file) / "tokenizer_config.json").read_text())
    assert "local_files_only" not in settings
    assert settings["tokenizer_class"] == "TokenizersBackend"
