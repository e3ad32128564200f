"""Loading, surgery and export of causal language models."""

from actors.models.chain import device, load_source, materialize, prune_to
from actors.models.export import export_model, save_pretrained
from actors.models.families import depth, find_layers, text_config
from actors.models.load import describe_model, load_model, load_tokenizer
from actors.models.replay import LayerwisePass
from actors.models.sharded import prune_checkpoint
from actors.models.streaming import load_streamed, resident
from actors.models.surgery import remove_layers, without_layers

__all__ = [
    "LayerwisePass",
    "depth",
    "describe_model",
    "device",
    "export_model",
    "find_layers",
    "load_model",
    "load_source",
    "load_streamed",
    "load_tokenizer",
    "materialize",
    "prune_checkpoint",
    "prune_to",
    "remove_layers",
    "resident",
    "save_pretrained",
    "text_config",
    "without_layers",
]
