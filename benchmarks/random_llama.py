"""Random models of Llama's shape, with a tokenizer, and the floating-point operations that they take."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.contracts import ModelSpec, TextSpec
from actors.data import load_texts
from actors.models import device

TEXT = TextSpec(builtin="wikitext-2-raw-validation")


@dataclass(frozen=True)
class Size:
    """Shape of a model, and the work that is done with it."""

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    dropped: tuple[int, ...]
    length: int
    batch: int
    steps: int = 6
    new_tokens: int = 64
    tied: bool = False


SIZES = {
    "tiny": Size(64, 128, 6, 4, 2, 1024, (2, 3), 64, 4, steps=3, new_tokens=8),
    "1b": Size(2048, 8192, 16, 32, 8, 128_256, tuple(range(8, 12)), 1024, 16, tied=True),
    "8b": Size(4096, 14_336, 32, 32, 8, 128_256, tuple(range(21, 28)), 1024, 8),
}


def forward_flops(size: Size, layers: int, head: bool = True) -> float:
    """Return the floating-point operations of one token through `layers` blocks and the head.

    Two a weight, and attention over half of the sequence on average: 2·T·D a block.
    """
    kv = size.width * size.kv_heads // size.heads
    weights = 2 * size.width * (size.width + kv) + 3 * size.width * size.mlp
    block = 2 * weights + 2 * size.length * size.width
    return layers * block + head * 2.0 * size.width * size.vocabulary


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a small byte-level tokenizer; what the tokens are does not change the work."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(load_texts(TEXT)[:200], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def save_random(size: Size, directory: Path, dtype: str) -> ModelSpec:
    """Write a random model of that size, drawn on the device that computes."""
    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=size.tied,
    )
    config.dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    with torch.device(device() if dtype != "float32" else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=config.dtype)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return ModelSpec(str(directory), dtype=dtype)
