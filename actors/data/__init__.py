"""Data: calibration and recovery text, from its source to token batches."""

from actors.data.batches import BlockData, TokenBatch, TrainingData
from actors.data.conversations import chat_template, conversation_sequences, read_prompts, render
from actors.data.packing import (
    PackedData,
    Sequence,
    collect,
    cut_into_blocks,
    pack_whole,
    shuffled,
    spool,
    up_to,
)
from actors.data.text import (
    BUILTIN_TEXTS,
    builtin_file,
    chat_template_text,
    describe_text,
    documents,
    load_texts,
    open_records,
)
from actors.data.tokens import (
    batch_order,
    calibration_sequences,
    pack_blocks,
    tokenize_documents,
    tokenize_text,
    tokenizer_fingerprint,
)

__all__ = [
    "BUILTIN_TEXTS",
    "BlockData",
    "PackedData",
    "Sequence",
    "TokenBatch",
    "TrainingData",
    "batch_order",
    "builtin_file",
    "calibration_sequences",
    "chat_template",
    "chat_template_text",
    "collect",
    "conversation_sequences",
    "cut_into_blocks",
    "describe_text",
    "documents",
    "load_texts",
    "open_records",
    "pack_blocks",
    "pack_whole",
    "read_prompts",
    "render",
    "shuffled",
    "spool",
    "tokenize_documents",
    "tokenize_text",
    "tokenizer_fingerprint",
    "up_to",
]
