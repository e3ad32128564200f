"""Removing layers from a checkpoint on disk, file by file, for models larger than memory.

A pruned safetensors file is a new header and a copy of the bytes that stay. No more than one tensor is in
memory.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from actors.contracts import Dtype, ModelDtype, ModelSpec
from actors.errors import RequestError
from actors.models.exporting.export import save_with_files, write_config
from actors.models.families import depth, find_layers
from actors.models.loading.checkpoint import FLOATING, INDEX, SINGLE, Checkpoint, StoredTensor, header_of
from actors.models.loading.conversion import Conversion
from actors.models.loading.load import (
    DTYPES,
    check_dtype,
    empty_model,
    load_config,
    load_model,
    load_tokenizer,
    model_checkpoint,
)
from actors.models.loading.source_files import copy_source_files, source_files
from actors.models.pruning.surgery import remaining, remove_layers

COPY_BYTES = 16 << 20
NAMES = {dtype: name for name, dtype in FLOATING.items()}
"""Floating-point types as safetensors name them; tensors of other types are never converted."""
MTP = re.compile(r"(^|\.)mtp[._]")
"""Tensors of multi-token prediction, which transformers does not load."""


def prune_checkpoint(
    source: str,
    layers: Sequence[int],
    output: str | Path,
    *,
    dtype: Dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[int, int]:
    """Write the checkpoint `source` without some of its blocks, in little memory.

    What is written is what `remove_layers` and `save_pretrained` would write;
    everything is checked on a model without weights first.

    Args:
        source: as for `load_model`. GGUF files are converted first, hub ids downloaded.
        layers: indices of the blocks to drop, 0..N-1.
        output: an empty or new directory.
        dtype: convert floating-point weights to `float32`, `bfloat16` or `float16`; as stored if not given.
        revision, trust_remote_code: as for `load_model`.

    Returns:
        Number of blocks left, number of parameters left.

    Raises:
        RequestError: as `load_model` and `remove_layers`.
    """
    spec = ModelSpec(source, dtype or "float32", revision, trust_remote_code)
    check_dtype(spec)
    checkpoint, config = model_checkpoint(spec), load_config(spec)
    load_tokenizer(spec)  # refused now rather than when the weights are written
    model = empty_model(spec, config)
    num_layers = depth(config)
    kept = remaining(num_layers, layers)
    block_list = find_layers(model)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_blocks = any(name.startswith(f"{block_list.path}.") for pair in tied.items() for name in pair)
    remove_layers(model, layers)
    if type(model.config) is not type(config) or tied_blocks:
        return _prune_in_memory(spec, checkpoint, dtype, layers, output)
    prefix = _layers_prefix(checkpoint.tensors, block_list.path, num_layers)
    renumbered = {old: new for new, old in enumerate(kept)}
    files = source_files(spec)
    Path(output).mkdir(parents=True, exist_ok=True)
    written = DTYPES[dtype] if dtype else None
    copy_source_files(files, Path(output))
    write_config(model, Path(output), files, kept=kept, dtype=written)
    _write_shards(checkpoint, Path(output), prefix, renumbered, written)
    return depth(model.config), model.num_parameters()


def _prune_in_memory(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    dtype: Dtype | None,
    layers: Sequence[int],
    output: str | Path,
) -> tuple[int, int]:
    """Prune where files are no image of the model: a decoder among others, weights shared or renamed.

    Each parameter is written in `dtype` or, without one, in the type that it is stored in.
    """
    tensors = [tensor for tensor in checkpoint.tensors.values() if tensor.dtype in FLOATING]
    stored = {FLOATING[tensor.dtype] for tensor in tensors}
    only = next(iter(stored)) if len(stored) == 1 else torch.float32
    as_loaded: ModelDtype = next((name for name, known in DTYPES.items() if known == only), "float32")
    model, _ = load_model(
        spec.path,
        dtype=dtype or as_loaded,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
    )
    if dtype is None and len(stored) > 1:
        conversion = Conversion(model)
        types = {conversion.parameter_of(tensor.name): FLOATING[tensor.dtype] for tensor in tensors}
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(types.get(name, parameter.dtype))
    kept = remaining(depth(model.config), layers)
    remove_layers(model, layers)
    save_with_files(model, Path(output), source_files(spec), kept)
    return depth(model.config), model.num_parameters()


def _layers_prefix(names: Iterable[str], path: str, num_layers: int) -> str:
    """Return the prefix of a layer's index in the file; older files leave out the model's own prefix.

    Raises:
        RequestError: no prefix, or more than one, under which all layers lie.
    """
    attribute = path.rpartition(".")[2]
    indices: dict[str, set[int]] = {}
    for name in names:
        if match := re.match(rf"(?:(.*?)\.)?{attribute}\.(\d+)\.", name):
            indices.setdefault(f"{match[1]}." if match[1] else "", set()).add(int(match[2]))
    whole = [prefix for prefix, found in indices.items() if found.issuperset(range(num_layers))]
    exact = [prefix for prefix in whole if f"{path}.".endswith(f"{prefix}{attribute}.")]
    if len(chosen := exact if len(exact) == 1 else whole) != 1:
        raise RequestError(
            f"the safetensors do not hold {num_layers} layers as '{path}.0' … '{path}.{num_layers - 1}'; "
            "get them again"
        )
    return f"{chosen[0]}{attribute}."


def _renamed(name: str, prefix: str, renumbered: Mapping[int, int]) -> str | None:
    """Return the tensor's name in the pruned model, None if its layer is dropped."""
    layer, _, rest = name.removeprefix(prefix).partition(".")
    if MTP.search(name):
        return None
    if not name.startswith(prefix) or not layer.isdecimal():
        return name
    # Layers beyond the last are those of multi-token prediction, too.
    return f"{prefix}{renumbered[int(layer)]}.{rest}" if int(layer) in renumbered else None


def _write_shards(
    checkpoint: Checkpoint,
    output: Path,
    prefix: str,
    renumbered: Mapping[int, int],
    dtype: torch.dtype | None,
) -> None:
    shards = []
    for file in checkpoint.files:
        kept = [
            (new, tensor)
            for tensor in checkpoint.tensors.values()
            if tensor.file == file and (new := _renamed(tensor.name, prefix, renumbered))
        ]
        shards += [(file, kept)] if kept else []
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, (file, kept) in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total_size += _write_shard(file, output / name, kept, dtype)
        weight_map |= {new: name for new, _ in kept}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (output / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    source: Path,
    target: Path,
    kept: Sequence[tuple[str, StoredTensor]],
    dtype: torch.dtype | None,
) -> int:
    """Write the tensors `kept` of one file under their new names; return their bytes."""
    header, num_bytes = header_of(
        (name, _written_dtype(tensor, dtype), tensor.shape, _size_bytes(tensor, dtype))
        for name, tensor in kept
    )
    with source.open("rb") as read, target.open("wb") as write:
        write.write(header)
        for _, tensor in kept:
            _copy(tensor, read, write, dtype)
    return num_bytes


def _written_dtype(tensor: StoredTensor, dtype: torch.dtype | None) -> str:
    return NAMES[dtype] if dtype and tensor.dtype in FLOATING else tensor.dtype


def _size_bytes(tensor: StoredTensor, dtype: torch.dtype | None) -> int:
    if (written := _written_dtype(tensor, dtype)) == tensor.dtype:
        return tensor.num_bytes
    return tensor.num_bytes // FLOATING[tensor.dtype].itemsize * FLOATING[written].itemsize


def _copy(tensor: StoredTensor, read: BinaryIO, write: BinaryIO, dtype: torch.dtype | None) -> None:
    read.seek(tensor.start)
    left = tensor.num_bytes
    convert = _written_dtype(tensor, dtype) != tensor.dtype
    while left:
        block = read.read(min(left, COPY_BYTES))
        left -= len(block)
        if convert:
            values = torch.frombuffer(bytearray(block), dtype=FLOATING[tensor.dtype]).to(dtype)
            block = values.view(torch.uint8).numpy().tobytes()
        write.write(block)
