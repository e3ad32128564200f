"""Tiny random models for tests: real architectures, real tokenizers, made in milliseconds.

Nothing is downloaded. The weights are drawn wide, so that dropping a layer
changes the output by far more than rounding does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 300
MAX_POSITIONS = 512

_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 5}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_inner": 64, "n_positions": MAX_POSITIONS},
    "bloom": {"n_layer": 6, "n_head": 4},
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gptj": {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_inner": 64, "rotary_dim": 4},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8} | _SLIDING,
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8} | _SLIDING,
    "olmo3": _SLIDING,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 8, "decoder_sparse_step": 1, "mlp_only_layers": [1, 4]} | _MOE,
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0, 1]},
    "diffllama": {},
    "gemma4_text": {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8} | _SLIDING,
}
"""Config fields of each family's `tiny_model` beyond the common sizes; layers differ where allowed."""

_CORPUS = (
    "The quick brown fox jumps over the lazy dog .",
    "Ancient deities are the gods and goddesses worshipped in the ancient land .",
    "Stability of the higher layer leads to greater stability of the lower layer .",
    " = There is a way = ",
)


@cache
def _trained_bpe() -> str:
    """A byte-level BPE of `VOCAB_SIZE` entries, as tokenizers' JSON."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS * 4, trainer)
    return bpe.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that can encode any text and adds no special tokens by itself."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_POSITIONS,
    )


def tiny_llama(
    num_layers: int = 4, seed: int = 0, **overrides: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random fp32 Llama (D=32, H=4, 2 KV heads, V≈300) in eval mode, and its tokenizer.

    `overrides` are LlamaConfig fields. The global random state is left as it was.
    """
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | overrides)))
    return model.float().eval(), tokenizer


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model of another family, in eval mode: D=32, N=6, V=`VOCAB_SIZE`.

    `overrides` are config fields. Sliding windows are short, so that they matter on a dozen tokens.
    """
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **(sizes | FAMILIES.get(family, {}) | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model.float().eval()


def save_tiny(directory: str | Path, num_layers: int = 4, seed: int = 0, **overrides: Any) -> str:
    """Save `tiny_llama(...)` as an ordinary Hugging Face directory and return its path."""
    model, tokenizer = tiny_llama(num_layers, seed, **overrides)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def tiny_ids(num_sequences: int = 2, num_tokens: int = 12, seed: int = 0) -> Tensor:
    """Random token ids [B, T] that avoid the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE - 50, (num_sequences, num_tokens), generator=generator)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The block list, by the name that the family gives it."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@contextmanager
def skipped(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """Compute as if the blocks `layers` were not there: each hands on what it received.

    The blocks still run and fill their part of the KV cache; only their output is thrown away.
    """

    def hand_on(_block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        received = args[0] if args else kwargs["hidden_states"]
        return (received, *output[1:]) if isinstance(output, tuple) else received

    hooks = [blocks_of(model)[i].register_forward_hook(hand_on, with_kwargs=True) for i in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
