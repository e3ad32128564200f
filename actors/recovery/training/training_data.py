"""Training data of a recovery: its text or conversations as sequences, and their order in the steps.

Shape letters: S sequences of a data set, B sequences of one optimizer step.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import LongTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.artifacts import cache_entry
from actors.contracts import RecoverySpec, TextSpec, digest
from actors.data import (
    RowTally,
    TokenSequence,
    TrainingData,
    batch_order,
    conversation_sequences,
    cut_into_blocks,
    describe_text,
    memory_mapped,
    open_records,
    pack_blocks,
    pack_sequences,
    shuffled,
    split_documents,
    take_tokens,
    tokenize_documents,
    tokenizer_fingerprint,
)
from actors.errors import RequestError
from actors.recovery.objectives import find_objective

SHUFFLE_BUFFER = 1000
"""Documents or conversations of a stream that are in memory at a time, to be drawn from."""


def training_data(spec: RecoverySpec, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Return the sequences of `spec.data`, the same on every worker.

    Running text fills blocks of `sequence_length` tokens; a conversation is a
    sequence by itself or, with `packing: documents`, shares one with others.
    They are kept tokenised on this node's disk, so that what is read and tokenised once
    serves all workers, runs and recoveries. With `streaming`, these are the first `max_tokens` tokens
    of the stream, shuffled by `spec.seed`.

    Raises:
        RequestError: data that cannot be read, too little of it, or no chat template.
        ChangedError: the data are not those that were planned with.
    """
    text, tally = spec.data, RowTally(spec.data)
    described: list[object] = [describe_text(text).fingerprint, tokenizer_fingerprint(tokenizer)]
    described += [spec.packing, spec.sequence_length]
    described += [spec.max_tokens, spec.seed] if text.streaming else []
    described += ["special tokens"] if spec.special_tokens else []
    make = partial(_stream_tokens if text.streaming else _sequences, spec, tokenizer, tally)
    data = memory_mapped(make, cache_entry("tokens", digest(described)), tally.counts)
    if len(data) < spec.batch_size:
        raise RequestError(
            f"the recovery data gives {len(data)} sequences of {spec.sequence_length} tokens, fewer than "
            f"one batch of {spec.batch_size}; give more text or make batch_size or sequence_length smaller"
        )
    return data


def training_order(spec: RecoverySpec, data: TrainingData, seed: int) -> LongTensor:
    """Return the sequences of each step: LongTensor [steps, B].

    As many whole steps as `max_tokens` holds, counting every token that the model
    reads, in every epoch, and as `epochs` have. What step s takes depends on s and `seed` alone.

    Raises:
        RequestError: `max_tokens` does not hold one step.
    """
    lengths_S = data.lengths_S
    epochs = spec.max_tokens // int(lengths_S.sum()) + 1
    num_steps = epochs * len(data) // spec.batch_size + 1
    if spec.epochs is not None:
        num_steps = min(num_steps, spec.epochs * len(data) // spec.batch_size)
    group_by = lengths_S if spec.group_by_length else None
    order_SB = batch_order(len(data), spec.batch_size, num_steps, seed, group_by)
    read_so_far = lengths_S[order_SB].sum(dim=1).cumsum(dim=0)
    num_steps = int(torch.searchsorted(read_so_far, spec.max_tokens, right=True))
    if num_steps == 0:
        raise RequestError(
            f"recovery.max_tokens {spec.max_tokens} is less than one step of {int(read_so_far[0])} tokens; "
            "raise it or make the batch smaller"
        )
    return order_SB[:num_steps]


def check_vocabulary(data: TrainingData, model: PreTrainedModel) -> None:
    """Check that the model has an embedding for every token id of the data.

    Raises:
        RequestError: it has not.
    """
    rows = model.get_input_embeddings().num_embeddings
    if data.largest_id >= rows:
        raise RequestError(
            f"the tokenizer of {model.name_or_path!r} gives the token id {data.largest_id}, but the model's "
            f"embedding has {rows} rows; use the tokenizer that belongs to the model"
        )


def check_data(objective: str, text: TextSpec) -> None:
    """Check that the data has what the objective trains on.

    Raises:
        RequestError: columns that are missing or have no use; names them.
    """
    wanted = find_objective(objective).trains_on
    answers = text.messages_column or (text.prompt_column and text.response_column) or text.generated
    where = f"recovery.data for the objective {objective!r}"
    if wanted == "text" and text.conversations:
        raise RequestError(f"{where}: it trains on running text (text_column); leave out all other columns")
    if wanted == "answers" and not answers:
        raise RequestError(f"{where} needs prompt_column and response_column, or messages_column")
    if wanted == "responses" and not text.conversations:
        raise RequestError(f"{where} needs the prompts to respond to: prompt_column or messages_column")


def _stream_tokens(
    spec: RecoverySpec, tokenizer: PreTrainedTokenizerBase, tally: RowTally
) -> Iterator[TokenSequence]:
    """Yield the first `max_tokens` tokens of a stream, and check afterwards that it did not change."""
    before = describe_text(spec.data).spec
    yield from take_tokens(_sequences(spec, tokenizer, tally), spec.max_tokens)
    describe_text(before)


def _sequences(
    spec: RecoverySpec, tokenizer: PreTrainedTokenizerBase, tally: RowTally
) -> Iterator[TokenSequence]:
    text, length, isolated = spec.data, spec.sequence_length, spec.packing == "documents"
    if text.conversations:
        conversations = conversation_sequences(text, tokenizer, length, spec.seed, tally)
        if text.streaming:
            conversations = shuffled(conversations, spec.seed, SHUFFLE_BUFFER)
        return pack_sequences(conversations, length) if isolated else conversations
    rows = (record[text.text_column] for record in open_records(text, spec.seed, tally))
    if not (text.streaming or isolated or spec.special_tokens):
        blocks = pack_blocks(rows, tokenizer, length, source=repr(text.name))
        return (TokenSequence(block) for block in blocks.numpy())
    texts = split_documents(rows)
    if text.streaming:
        texts = shuffled(texts, spec.seed, SHUFFLE_BUFFER)
    documents = tokenize_documents(texts, tokenizer, repr(text.name), spec.special_tokens)
    return cut_into_blocks(documents, length, isolated)
