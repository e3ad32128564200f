from .bad_rows import RowTally
from .batches import TokenBatch, TopK, TrainingData
from .conversations import chat_template, conversation_sequences, read_prompts, render
from .packing import (
    PackedData,
    TokenSequence,
    cut_into_blocks,
    memory_mapped,
    pack_sequences,
    shuffled,
    take_tokens,
)
from .read_ahead import ReadAhead
from .teacher_states import TaughtData, TeacherStates, with_teacher_states
from .text import (
    BUILTIN_TEXTS,
    builtin_file,
    chat_template_text,
    describe_text,
    load_texts,
    open_records,
    split_documents,
)
from .tokens import (
    batch_order,
    calibration_sequences,
    pack_blocks,
    tokenize_documents,
    tokenize_text,
    tokenizer_errors,
    tokenizer_fingerprint,
)

__all__ = [
    "BUILTIN_TEXTS",
    "PackedData",
    "ReadAhead",
    "RowTally",
    "TaughtData",
    "TeacherStates",
    "TokenSequence",
    "TokenBatch",
    "TopK",
    "TrainingData",
    "batch_order",
    "builtin_file",
    "calibration_sequences",
    "chat_template",
    "chat_template_text",
    "conversation_sequences",
    "cut_into_blocks",
    "describe_text",
    "split_documents",
    "load_texts",
    "tokenizer_errors",
    "open_records",
    "pack_blocks",
    "pack_sequences",
    "read_prompts",
    "render",
    "shuffled",
    "memory_mapped",
    "tokenize_documents",
    "tokenize_text",
    "tokenizer_fingerprint",
    "take_tokens",
    "with_teacher_states",
]
