"""Data: calibration and recovery text, from its source to token batches."""

from actors.data.batches import BlockData, TokenBatch, TrainingData
from actors.data.text import BUILTIN_TEXTS, builtin_file, describe_text, load_texts
from actors.data.tokens import batch_order, calibration_sequences, pack_blocks, tokenize_text

__all__ = [
    "BUILTIN_TEXTS",
    "BlockData",
    "TokenBatch",
    "TrainingData",
    "batch_order",
    "builtin_file",
    "calibration_sequences",
    "describe_text",
    "load_texts",
    "pack_blocks",
    "tokenize_text",
]
