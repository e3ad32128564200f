"""Checks, without reading a weight, that a checkpoint holds the model that its config.json describes."""

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from actors.errors import RequestError
from actors.models.families import depth, find_layers, text_config
from actors.models.loading.checkpoint import FLOATING, Checkpoint, StoredTensor

COMPARED_BYTES = 64 << 20


def check_layer_count(checkpoint: Checkpoint, config: PretrainedConfig) -> None:
    """Refuse a depth that the file cannot have, before a model so deep is built.

    Raises:
        RequestError: fewer than one layer, or more layers than tensors.
    """
    num_layers = getattr(text_config(config), "num_hidden_layers", None)
    if isinstance(num_layers, int) and not 0 < num_layers <= len(checkpoint.tensors):
        raise RequestError(
            f"model {str(checkpoint.directory)!r}: config.json says num_hidden_layers {num_layers}, but its "
            f"safetensors hold {len(checkpoint.tensors)} tensors; get the model again"
        )


def check_complete(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Check that a checkpoint has each weight of `model`, in its shape, and no layer besides.

    transformers itself matches names and shapes, as when it loads the model, but on
    tensors that have no data: families whose files hold experts one by one, or use
    other names, are read by the rules by which they are loaded.

    Args:
        model: the model that config.json describes, without weights.

    Raises:
        RequestError: names the tensor, and where it is not as the model needs it.
    """
    path, config = str(checkpoint.directory), model.config
    for name in checkpoint.tensors:
        if (prefixed := f"{model.base_model_prefix}.{name}") in checkpoint.tensors:
            raise RequestError(
                f"model {path!r} holds both {name!r} and {prefixed!r}, which are "
                "the same weight; get the model again"
            )
    headers = {
        name: torch.empty(tensor.shape, dtype=FLOATING[tensor.dtype], device="meta")
        for name, tensor in checkpoint.tensors.items()
        if tensor.dtype in FLOATING
    }
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        empty, loading = type(model).from_pretrained(
            None,
            config=config,
            state_dict=headers,
            dtype=torch.float32,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    if loading["mismatched_keys"]:
        name, stored, needed = min(loading["mismatched_keys"])
        raise RequestError(
            f"model {path!r}: its safetensors hold {name!r} of shape {list(stored)}, but by config.json "
            f"it is of shape {list(needed)}; get the model again"
        )
    needed_dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    lacking = {name for name in loading["missing_keys"] if needed_dtypes[name].is_floating_point}
    if lacking:
        _refuse_missing(checkpoint, lacking)
    if loading["unexpected_keys"]:
        _check_nothing_besides(checkpoint, empty, loading["unexpected_keys"])
    _check_tied(checkpoint, model)


def _refuse_missing(checkpoint: Checkpoint, names: Collection[str]) -> None:
    path, first = str(checkpoint.directory), min(names)
    stored = checkpoint.tensors.get(first)
    if stored is not None:
        raise RequestError(
            f"model {path!r}: its safetensors hold {first!r} as {stored.dtype}, which is no type of weights "
            f"({', '.join(FLOATING)}): it is quantised; use the unquantised model"
        )
    raise RequestError(
        f"model {path!r}: its safetensors lack {len(names)} weights, such as {first!r}, that config.json "
        "asks for; get the model again"
    )


def _check_nothing_besides(checkpoint: Checkpoint, model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """Refuse layers and parts of modules that the model would silently be without.

    What lies outside it, such as a vision tower or buffers of older versions, has no part in it.
    """
    modules = dict(model.named_modules())
    num_layers, config = depth(model.config), text_config(model.config)
    predicted = getattr(config, "num_nextn_predict_layers", None) or 0
    inside = re.compile(rf"{re.escape(find_layers(model).path)}\.(\d+)\.")
    for name in sorted(unexpected):
        layer = inside.match(name)
        if layer and int(layer[1]) >= num_layers:
            if int(layer[1]) < num_layers + predicted:
                continue  # of multi-token prediction
            raise RequestError(
                f"model {str(checkpoint.directory)!r}: its safetensors hold {name!r}, but config.json has "
                f"only num_hidden_layers {num_layers}; get the model again"
            )
        owner, _, kind = name.rpartition(".")
        module = modules.get(owner)
        weighted = module is not None and any(True for _ in module.parameters(recurse=False))
        if kind in ("weight", "bias") and (weighted or (layer and module is None)):
            raise RequestError(
                f"model {str(checkpoint.directory)!r}: its safetensors hold {name!r}, which a model of its "
                "config.json does not have and would compute without; get the model again"
            )


def _check_tied(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse a second copy of a tied weight unless it is the same: nothing states which of them counts."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        copy, original = (stored_as(name, model, checkpoint.tensors) for name in (target, source))
        if copy and original and not _same_values(copy, original):
            raise RequestError(
                f"model {str(checkpoint.directory)!r}: config.json ties {target!r} to {source!r} (field "
                "tie_word_embeddings), but its safetensors hold both, with other values; set the field to "
                "false if they are two weights, or remove the copy"
            )


def stored_as(name: str, model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """Return a parameter as stored; a file written from the bare backbone lacks its name's first part."""
    return tensors.get(name) or tensors.get(name.removeprefix(f"{model.base_model_prefix}."))


def _same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Return true if two stored tensors are equal, read a part at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        for start in range(0, one.num_bytes, COMPARED_BYTES):
            size = min(COMPARED_BYTES, one.num_bytes - start)
            if first.read(size) != second.read(size):
                return False
    return True
