"""Longest input of a model: where its positions are rows of a table, as long as the table."""

from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.models.families import text_config

TABLES = frozenset({"wpe", "position_embeddings", "embed_positions", "positions_embed", "pos_encoding"})
"""Names that families give to a table with a row a position, learned or computed when the model is built."""

OTHER_TOWERS = ("vision", "audio", "image", "visual")
CONTEXT_FIELDS = ("max_position_embeddings", "max_seq_len")
ALIBI_BY_TABLE = ("mpt",)
"""Types whose attention bias is built once, for as many positions as the config names."""


def context_length(model: PreTrainedModel) -> int | None:
    """Return the longest input that the config names; None if it names none."""
    config = text_config(model.config)
    named = (getattr(config, name, None) for name in CONTEXT_FIELDS)
    return next((value for value in named if isinstance(value, int)), None)


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the longest input that the model can compute; None where positions have no table.

    Rotary positions and ALiBi go on beyond what the config names; a table has no further row.
    """
    named = context_length(model)
    if model.config.model_type in ALIBI_BY_TABLE:
        return named
    rows = list(_position_rows(model))
    if not rows:
        return None
    return min([*rows, named] if named is not None else rows)


def _position_rows(model: PreTrainedModel) -> Iterator[int]:
    for path, module in model.named_modules():
        if any(tower in path for tower in OTHER_TOWERS):
            continue
        if path.rpartition(".")[2] in TABLES and isinstance(module, nn.Embedding):
            # Families with a padding index (RoBERTa) begin to count behind it.
            yield module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        tables = TABLES & {*vars(module), *module._buffers}
        for table in (getattr(module, name) for name in sorted(tables)):
            if isinstance(table, Tensor) and table.dim() == 2:
                yield table.shape[0]
