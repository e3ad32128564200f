"""From text to token ids: blocks for training, sequences for calibration, the order of batches.

Shape letters: S sequences of a data set, B sequences of one optimizer step, T tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedTokenizerBase

from actors.contracts import digest
from actors.data.files import one_line_reason
from actors.errors import IterabreError, RequestError

DOCUMENTS_PER_BATCH = 256
"""Documents in one call of the tokenizer, which runs on several cores."""
BATCHES_TO_GROUP = 50
"""Batches whose sequences are sorted by length together, as transformers' `group_by_length` does."""


@contextmanager
def tokenizer_errors(row: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Turn what a tokenizer or a chat template raises into a RequestError that begins with `row`."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{row}: {error}") from error
    except (IterabreError, MemoryError):
        raise
    except Exception as error:
        raise RequestError(
            f"{row}: the tokenizer of {tokenizer.name_or_path!r} cannot read it ({one_line_reason(error)}); "
            "mend the row or leave it out, and use the tokenizer that belongs to the model"
        ) from error


def encode_rows(
    rows: list[str], tokenizer: PreTrainedTokenizerBase, name: Callable[[int], str], **options: Any
) -> list[list[int]]:
    """Return the token ids of each row.

    Raises:
        RequestError: the tokenizer cannot read a row; `name` gives its label from its place in `rows`.
    """
    options = {"verbose": False, **options}
    try:
        return tokenizer(rows, **options)["input_ids"]
    except Exception:
        for place, row in enumerate(rows):  # only to say which row it is
            with tokenizer_errors(name(place), tokenizer):
                tokenizer(row, **options)
        raise


def tokenize_text(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    source: str = "the text",
) -> LongTensor:
    """Return all texts as one run of token ids, at most `max_tokens` of them: LongTensor [T].

    The texts are concatenated before tokenising, as language modelling on
    WikiText is done since GPT-2, and no special tokens are added. A text that
    does not end its line is followed by a newline, so that documents of a
    JSONL file do not run into each other. `source` is what messages call the text.
    """
    parts: list[str] = []
    rows = list(texts)
    for text in rows:
        if parts and not parts[-1].endswith("\n"):
            parts.append("\n")
        if text:
            parts.append(text)
    # verbose=False: the text is longer than the model's context on purpose; it is cut into windows later.
    try:
        ids = tokenizer("".join(parts), add_special_tokens=False, verbose=False)["input_ids"]
    except Exception:
        encode_rows(rows, tokenizer, lambda row: f"row {row} of {source}", add_special_tokens=False)
        raise
    return torch.tensor(ids[:max_tokens], dtype=torch.long)


def pack_blocks(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    max_tokens: int | None = None,
    source: str = "the text",
) -> LongTensor:
    """Cut the concatenated texts into full blocks: LongTensor [S, T], T = `sequence_length`.

    S·T is the exact number of tokens used; it never exceeds `max_tokens`, and
    the tail that does not fill a block is left out.

    Raises RequestError if there are fewer tokens than one block holds.
    """
    ids = tokenize_text(texts, tokenizer, max_tokens, source)
    num_blocks = len(ids) // sequence_length
    if num_blocks == 0:
        limit = "" if max_tokens is None else f" (max_tokens is {max_tokens})"
        raise RequestError(
            f"{source} gives {len(ids)} tokens{limit}, fewer than one sequence of {sequence_length}; "
            "give more text or a smaller sequence_length"
        )
    return ids[: num_blocks * sequence_length].view(num_blocks, sequence_length)


def tokenize_documents(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    source: str = "the text",
    special_tokens: bool = False,
) -> Iterator[list[int]]:
    """Yield the token ids of each document by itself, with `special_tokens` as the tokenizer adds them.

    As in `tokenize_text`, a document that does not end its line is followed by a newline.
    """
    remaining = iter(texts)
    while chunk := list(islice(remaining, DOCUMENTS_PER_BATCH)):
        whole = [text if text.endswith("\n") else text + "\n" for text in chunk]
        # In a shuffled stream a document has no number.
        labels = [f"the document of {source} that begins with {text[:40]!r}" for text in whole]
        yield from encode_rows(whole, tokenizer, labels.__getitem__, add_special_tokens=special_tokens)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash all by which a text could give other tokens, or a conversation another text."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else type(tokenizer).__name__
    return digest([backend, tokenizer.get_vocab(), tokenizer.chat_template])


def calibration_sequences(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    max_sequences: int | None = None,
    source: str = "the calibration text",
) -> list[LongTensor]:
    """Return one sequence for each of the first `max_sequences` rows that are not blank.

    Each is a LongTensor [T], T ≤ `sequence_length`, with the tokenizer's
    default special tokens. The newline that ends a row is not part of it.

    Raises RequestError if every row is blank.
    """
    rows = [(row, text.rstrip("\r\n")) for row, text in enumerate(texts) if text.strip()][:max_sequences]
    if not rows:
        raise RequestError(f"{source} has no row that is not blank")
    encoded = encode_rows(
        [text for _, text in rows],
        tokenizer,
        lambda place: f"row {rows[place][0]} of {source}",
        truncation=True,
        max_length=sequence_length,
    )
    return [torch.tensor(ids, dtype=torch.long) for ids in encoded]


def batch_order(
    num_sequences: int,
    batch_size: int,
    num_steps: int,
    seed: int,
    lengths_S: Tensor | None = None,
) -> LongTensor:
    """Return the sequences of each optimizer step: LongTensor [`num_steps`, `batch_size`].

    The sequences are shuffled anew for every epoch and the epochs are strung
    together, so that each step is full. Rows depend on `seed` alone: how many
    workers share a step does not matter, and a longer run begins like a
    shorter one, so a resumed run goes on where it stopped.

    Args:
        lengths_S: if given, of every BATCHES_TO_GROUP batches of an epoch the sequences are sorted
            by length and cut into batches anew, which are then shuffled.

    Raises RequestError if there are no sequences.
    """
    if num_sequences < 1:
        raise RequestError("there are no training sequences to order")
    generator = torch.Generator().manual_seed(seed)
    num_epochs = -(-num_steps * batch_size // num_sequences)
    epochs = [torch.randperm(num_sequences, generator=generator) for _ in range(num_epochs)]
    if lengths_S is not None:
        draw = torch.Generator().manual_seed(seed)
        epochs = [_grouped(epoch, batch_size, lengths_S, draw) for epoch in epochs]
    stream = torch.cat(epochs) if epochs else torch.empty(0, dtype=torch.long)
    return stream[: num_steps * batch_size].view(num_steps, batch_size)


def _grouped(epoch_S: Tensor, batch_size: int, lengths_S: Tensor, draw: torch.Generator) -> Tensor:
    groups = []
    for group in epoch_S.split(batch_size * BATCHES_TO_GROUP):
        batches = group[lengths_S[group].argsort(descending=True, stable=True)].split(batch_size)
        groups += [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]
    return torch.cat(groups)
