"""Loading, surgery and export of causal language models."""

from actors.models.adapter_deltas import Deltas, join_deltas, read_deltas
from actors.models.chain import device, load_source, materialize, prune_to
from actors.models.export import export_model, save_pretrained
from actors.models.families import depth, find_layers, text_config
from actors.models.load import describe_model, load_model, load_tokenizer
from actors.models.removable import check_prunable, choose_removable, removable
from actors.models.replay import LayerwisePass
from actors.models.sharded import prune_checkpoint
from actors.models.streaming import load_streamed, resident
from actors.models.subblocks import (
    BLOCK,
    GRANULARITIES,
    check_granularity,
    check_sub_blocks,
    empty_sub_blocks,
    sub_block_weights,
    without_sub_block,
)
from actors.models.surgery import remove_layers, without_layers
from actors.models.weights import put_weights, read_weights, save_weights, weight_shapes

__all__ = [
    "BLOCK",
    "Deltas",
    "GRANULARITIES",
    "LayerwisePass",
    "check_granularity",
    "check_prunable",
    "check_sub_blocks",
    "choose_removable",
    "depth",
    "describe_model",
    "device",
    "empty_sub_blocks",
    "export_model",
    "find_layers",
    "join_deltas",
    "load_model",
    "load_source",
    "load_streamed",
    "load_tokenizer",
    "materialize",
    "prune_checkpoint",
    "prune_to",
    "put_weights",
    "read_deltas",
    "read_weights",
    "removable",
    "remove_layers",
    "resident",
    "save_pretrained",
    "save_weights",
    "sub_block_weights",
    "text_config",
    "weight_shapes",
    "without_layers",
    "without_sub_block",
]
