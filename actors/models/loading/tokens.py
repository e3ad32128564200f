"""Checks of a tokenizer: it has a vocabulary, and the model a row for each of its tokens."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.errors import RequestError

ANY_TEXT = "A a 1 ."


def check_has_vocabulary(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Refuse an empty tokenizer: without its files, transformers makes some of them so.

    Raises:
        RequestError: it is empty.
    """
    ids = tokenizer(ANY_TEXT, add_special_tokens=False)["input_ids"]
    if not set(ids) - {tokenizer.unk_token_id}:
        raise RequestError(
            f"the tokenizer of {str(directory)!r} has no vocabulary: its tokenizer.json (or what its "
            "tokenizer_config.json asks for) is not there; get the tokenizer again"
        )


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest token id that the tokenizer can give."""
    return max(tokenizer.get_vocab().values(), default=-1)


def check_token_ids(sequences: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Check that an embedding of so many rows has one for every token.

    Raises:
        RequestError: it has not; names the token.
    """
    largest = max((int(sequence.max()) for sequence in sequences if sequence.numel()), default=-1)
    if largest >= rows:
        raise RequestError(
            f"the tokenizer of {tokenizer.name_or_path!r} gives the token "
            f"{tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}), but the model's embedding has "
            f"{rows} rows; use the tokenizer that belongs to the model"
        )


def guard_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the model refuse tokens that it has no row for, where its tokenizer could give any.

    Without that, a CPU raises an IndexError and a GPU ends the process.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding) and largest_id(tokenizer) >= embedding.num_embeddings:
        embedding.register_forward_pre_hook(partial(_check_input, tokenizer))


def _check_input(
    tokenizer: PreTrainedTokenizerBase, embedding: nn.Embedding, inputs: tuple[Any, ...]
) -> None:
    check_token_ids(inputs, tokenizer, embedding.num_embeddings)
