from .adapter_deltas import Deltas, add_deltas, join_deltas, read_deltas
from .exporting.export import export_model, save_pretrained
from .families import depth, find_layers, text_config
from .layerwise import LayerwisePass
from .loading.load import describe_model, load_model, load_tokenizer, open_model
from .loading.source import check_revision
from .model_builder import build_model, device, load_source, prune_to
from .offloading.placement import places
from .offloading.sharded import prune_checkpoint
from .offloading.streaming import load_streamed, resident
from .pruning.removable import any_layers, check_prunable, choose_removable, removable_layers
from .pruning.surgery import remove_layers, without_layers
from .weights import put_weights, read_weights, save_weights, weight_shapes

__all__ = [
    "Deltas",
    "LayerwisePass",
    "add_deltas",
    "any_layers",
    "check_prunable",
    "check_revision",
    "choose_removable",
    "depth",
    "describe_model",
    "device",
    "export_model",
    "find_layers",
    "join_deltas",
    "load_model",
    "load_source",
    "load_streamed",
    "load_tokenizer",
    "build_model",
    "open_model",
    "places",
    "prune_checkpoint",
    "removable_layers",
    "prune_to",
    "put_weights",
    "read_deltas",
    "read_weights",
    "remove_layers",
    "resident",
    "save_pretrained",
    "save_weights",
    "text_config",
    "weight_shapes",
    "without_layers",
]
