"""Removing layers from a checkpoint on disk, file by file, for models larger than memory.

A safetensors file is an 8-byte length, a JSON header and the tensors' bytes
(https://github.com/huggingface/safetensors#format), so a pruned file is a new
header and a copy of the bytes that stay. No more than one tensor is in memory.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn
from transformers import PreTrainedModel

from actors.contracts import ModelSpec
from actors.errors import RequestError
from actors.models.export import save_pretrained
from actors.models.families import depth, find_layers
from actors.models.load import (
    DTYPES,
    check_dtype,
    empty_model,
    load_config,
    load_model,
    load_tokenizer,
    snapshot,
)
from actors.models.subblocks import (
    BLOCK,
    check_emptiable,
    check_granularity,
    empty_sub_blocks,
    sub_block_paths,
    sub_block_weights,
)
from actors.models.surgery import remaining, remove_layers

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COPY_BYTES = 16 << 20
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating-point types as safetensors name them; tensors of other types are never converted."""
NAMES = {dtype: name for name, dtype in STORED.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its type, its shape and where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def prune_checkpoint(
    source: str,
    layers: Sequence[int],
    output: str | Path,
    *,
    dtype: str | None = None,
    granularity: str = BLOCK,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[int, int]:
    """Write the checkpoint `source` without some of its blocks, or with sub-blocks empty, in little memory.

    What is written is what `remove_layers` (or `empty_sub_blocks`) and
    `save_pretrained` would write; everything is checked on a model without weights
    first.

    Args:
        source: as for `load_model`. GGUF files are converted first, hub ids downloaded.
        layers: indices of the blocks to drop, 0..N-1.
        output: an empty or new directory.
        granularity: `block`, or `attention` or `mlp` to fill only that part of the blocks with zeros.
        dtype: convert floating-point weights to `float32`, `bfloat16` or `float16`; as stored if not given.
        revision, trust_remote_code: as for `load_model`.

    Returns:
        Number of blocks left, number of parameters left.

    Raises:
        RequestError: as `load_model`, `remove_layers` and `empty_sub_blocks`.
    """
    check_granularity(granularity)
    spec = ModelSpec(source, dtype or "float32", revision, trust_remote_code)
    check_dtype(spec)
    directory, config = snapshot(spec), load_config(spec)
    model = empty_model(spec, config)
    num_layers = depth(config)
    kept = remaining(num_layers, layers)
    block_list = find_layers(model)
    in_place = type(model.config) is type(config) and not _tied_across_layers(model, block_list.path)
    if granularity == BLOCK:
        remove_layers(model, layers)
    else:
        check_emptiable(model, granularity)
        kept = list(range(num_layers))
    if not in_place:
        return _prune_in_memory(spec, layers, output, granularity)
    if hasattr(config, "quantization_config"):
        raise RequestError(
            f"model {source!r} is quantised (config field 'quantization_config'), by layer names that "
            "pruning would change; prune the unquantised model"
        )
    tensors = [tensor for file in shard_files(directory) for tensor in read_header(file)]
    prefix = _layers_prefix([tensor.name for tensor in tensors], block_list.path, num_layers)
    zeros: set[str] | None = set()
    if granularity != BLOCK:
        zeros = _sub_block_tensors(block_list.modules, granularity, layers, prefix, tensors)
    if zeros is None:
        return _prune_in_memory(spec, layers, output, granularity)
    renumbered = {old: new for new, old in enumerate(kept)}
    Path(output).mkdir(parents=True, exist_ok=True)
    written = DTYPES[dtype] if dtype else None
    _write_shards(directory, Path(output), prefix, renumbered, written, zeros)
    _write_descriptions(spec, model, directory, Path(output), written)
    return depth(model.config), model.num_parameters()


def _sub_block_tensors(
    blocks: nn.ModuleList, kind: str, layers: Sequence[int], prefix: str, tensors: Sequence[Stored]
) -> set[str] | None:
    """Names in the files of the sub-blocks' parameters; None if the files name them otherwise than the model.

    Files may hold experts one by one that the model holds together: what counts is
    that all stored under a sub-block's modules, but for buffers, is as much as its parameters.
    """
    found: set[str] = set()
    for layer in layers:
        paths = tuple(f"{prefix}{layer}.{path}." for path in sub_block_paths(blocks[layer], kind))
        buffers = {f"{prefix}{layer}.{name}" for name, _ in blocks[layer].named_buffers()}
        stored = [t for t in tensors if t.name.startswith(paths) and t.name not in buffers]
        held = sum(parameter.numel() for parameter in sub_block_weights(blocks[layer], kind).values())
        if sum(math.prod(tensor.shape) for tensor in stored) != held:
            return None
        found |= {tensor.name for tensor in stored}
    return found


def _prune_in_memory(
    spec: ModelSpec, layers: Sequence[int], output: str | Path, granularity: str
) -> tuple[int, int]:
    """For files that are no image of the model: a decoder among others, weights shared or named otherwise."""
    model, tokenizer = load_model(
        spec.path,
        dtype=spec.dtype,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
    )
    if granularity == BLOCK:
        remove_layers(model, layers)
    else:
        empty_sub_blocks(model, granularity, layers)
    save_pretrained(model, output, tokenizer=tokenizer)
    return depth(model.config), model.num_parameters()


def _tied_across_layers(model: PreTrainedModel, path: str) -> bool:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return any(name.startswith(f"{path}.") for pair in tied.items() for name in pair)


def shard_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order.

    Raises:
        RequestError: a shard that the index names is not there.
    """
    index = directory / INDEX
    if not index.is_file():
        return [directory / SINGLE]
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise RequestError(
            f"model {str(directory)!r} lacks {missing[0]!r}, which its index names; get it again"
        )
    return [directory / name for name in names]


def read_header(file: Path) -> list[Stored]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        RequestError: the file is cut off or is no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(min(length, size))
    try:
        header = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{str(file)!r} is no safetensors file: its header is unreadable") from error
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = [
        Stored(name, entry["dtype"], tuple(entry["shape"]), *(data + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    ]
    if any(tensor.end > size for tensor in tensors):
        raise RequestError(f"{str(file)!r} is cut off; get it again")
    return sorted(tensors, key=lambda tensor: tensor.start)


def _layers_prefix(names: Iterable[str], path: str, num_layers: int) -> str:
    """What stands before a layer's index in the file; older files leave out the model's own prefix.

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
    """The tensor's name in the pruned model, None if its layer goes."""
    layer, _, rest = name.removeprefix(prefix).partition(".")
    if not name.startswith(prefix) or not layer.isdecimal():
        return name
    # Layers beyond the last are those of multi-token prediction, which transformers does not load either.
    return f"{prefix}{renumbered[int(layer)]}.{rest}" if int(layer) in renumbered else None


def _write_shards(
    directory: Path,
    output: Path,
    prefix: str,
    renumbered: Mapping[int, int],
    dtype: torch.dtype | None,
    zeros: Collection[str],
) -> None:
    shards = []
    for file in shard_files(directory):
        kept = [
            (new, tensor)
            for tensor in read_header(file)
            if (new := _renamed(tensor.name, prefix, renumbered))
        ]
        shards += [(file, kept)] if kept else []
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, (file, kept) in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total_size += _write_shard(file, output / name, kept, dtype, zeros)
        weight_map |= {new: name for new, _ in kept}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (output / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    source: Path,
    target: Path,
    kept: Sequence[tuple[str, Stored]],
    dtype: torch.dtype | None,
    zeros: Collection[str],
) -> int:
    """Write the tensors `kept` of one file under their new names, zeros for `zeros`; returns their bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in kept:
        size = _size_bytes(tensor, dtype)
        header[name] = {
            "dtype": _written_dtype(tensor, dtype),
            "shape": tensor.shape,
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as read, target.open("wb") as write:
        write.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in kept:
            if tensor.name in zeros:
                _write_zeros(_size_bytes(tensor, dtype), write)
            else:
                _copy(tensor, read, write, dtype)
    return at


def _write_zeros(size: int, write: BinaryIO) -> None:
    """So many zero bytes, which are zeros in every floating-point type."""
    for start in range(0, size, COPY_BYTES):
        write.write(bytes(min(COPY_BYTES, size - start)))


def _written_dtype(tensor: Stored, dtype: torch.dtype | None) -> str:
    return NAMES[dtype] if dtype and tensor.dtype in STORED else tensor.dtype


def _size_bytes(tensor: Stored, dtype: torch.dtype | None) -> int:
    stored = tensor.end - tensor.start
    if (written := _written_dtype(tensor, dtype)) == tensor.dtype:
        return stored
    return stored // STORED[tensor.dtype].itemsize * STORED[written].itemsize


def _copy(tensor: Stored, read: BinaryIO, write: BinaryIO, dtype: torch.dtype | None) -> None:
    read.seek(tensor.start)
    left = tensor.end - tensor.start
    convert = _written_dtype(tensor, dtype) != tensor.dtype
    while left:
        block = read.read(min(left, COPY_BYTES))
        left -= len(block)
        if convert:
            values = torch.frombuffer(bytearray(block), dtype=STORED[tensor.dtype]).to(dtype)
            block = values.view(torch.uint8).numpy().tobytes()
        write.write(block)


def _write_descriptions(
    spec: ModelSpec, model: PreTrainedModel, directory: Path, output: Path, dtype: torch.dtype | None
) -> None:
    """Config, generation config and tokenizer beside the weights."""
    model.config.architectures = [type(model).__name__]
    if dtype is not None:
        model.config.dtype = dtype
    model.config.save_pretrained(output)
    generation = directory / "generation_config.json"
    if generation.is_file():
        (output / generation.name).write_bytes(generation.read_bytes())
    load_tokenizer(spec).save_pretrained(output)
