"""Weights of a model directory: the one reading that loading, streaming, pruning and planning share.

A safetensors file is an 8-byte length, a JSON header and the tensors' bytes
(https://github.com/huggingface/safetensors#format). Headers are read and written here, and nowhere else.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.errors import RequestError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
"""The name that transformers gives a shard."""

ADAPTER = "adapter_config.json"
PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LFS_POINTER = b"version https://git-lfs"
LONGEST_HEADER = 100_000_000
"""Bytes beyond which the safetensors library refuses a header."""

FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights, as safetensors name them. Tensors of other types are buffers, or quantised."""

BITS = {name: dtype.itemsize * 8 for name, dtype in FLOATING.items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "C64": 64,
    "BOOL": 8,
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **{f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)},
}
"""Size of an element of every type of safetensors."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its type, its shape and where its bytes lie."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    def read(self) -> Tensor:
        """Return the tensor, which must be of a floating-point type, in memory of its own."""
        raw = torch.empty(self.num_bytes, dtype=torch.uint8)
        view, done = memoryview(raw.numpy()), 0
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start)
            # One call reads at most 2 GiB.
            while done < self.num_bytes and (count := stream.readinto(view[done:])):
                done += count
        if done < self.num_bytes:
            raise RequestError(f"{str(self.file)!r} ends too early: it is damaged; get the model again")
        return raw.view(FLOATING[self.dtype]).view(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a directory, in order, and every tensor in them by its name."""

    directory: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read the headers of the directory's weight files.

    Those are the shards that the index names, or else `model.safetensors`, as for
    transformers; other safetensors files do not count.

    Raises:
        RequestError: no weights, an adapter beside them, more than one reading, an index that
            is not of these files, or a damaged file; names it.
    """
    if (directory / ADAPTER).exists():
        raise RequestError(
            f"model {str(directory)!r} has an adapter beside it ({ADAPTER}), which transformers would add to "
            "its weights; merge the adapter, or move its files elsewhere"
        )
    weight_map = _weight_map(directory)
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    _check_only_reading(directory, names, weight_map is not None)
    files = tuple(directory / name for name in names)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise RequestError(
                    f"model {str(directory)!r} holds tensor {tensor.name!r} twice, in "
                    f"{tensors[tensor.name].file.name!r} and {file.name!r}; get the model again"
                )
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _check_index(directory, weight_map, tensors)
    return Checkpoint(directory, files, tensors)


def weight_names(directory: Path) -> list[str]:
    """Return the names of the files that hold a model's weights, whether they are there or not."""
    weight_map = _weight_map(directory)
    return [SINGLE] if weight_map is None else sorted(set(weight_map.values()))


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Return the file of each tensor as the index has it; None if there is no index."""
    file = directory / INDEX
    if not file.exists() and not file.is_symlink():
        return None
    index = read_json(file)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(index.get("metadata"), dict):
        raise RequestError(f"{str(file)!r} is no index: it lacks 'weight_map' or 'metadata'; get it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise RequestError(
                f"{str(file)!r} says that {name!r} is in {shard!r}, which is no safetensors file of this "
                "directory; get the index again"
            )
    return weight_map


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of unique keys.

    Raises:
        RequestError: it is none; names the file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{str(file)!r} cannot be read as JSON ({error}); get it again") from error
    if not isinstance(value, dict):
        raise RequestError(f"{str(file)!r} holds no JSON object; get it again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r} twice")
    return found


def _check_only_reading(directory: Path, names: list[str], indexed: bool) -> None:
    """Refuse missing weights, and a single file beside shards, of which programs take either."""
    shards = sorted(file.name for file in directory.iterdir() if SHARD.fullmatch(file.name))
    single = directory / SINGLE
    if single.exists() and (names != [SINGLE] if indexed else shards):
        others = f"{INDEX!r} of other files" if indexed else f"{shards[0]!r}"
        raise RequestError(
            f"model {str(directory)!r} has both {SINGLE!r} and {others}: it is not said which of them "
            "are its weights; remove the others"
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if not missing:
        return
    path = str(directory)
    if indexed:
        raise RequestError(f"model {path!r} lacks {missing[0]!r}, which its index names; get it again")
    if shards:
        raise RequestError(f"model {path!r} has {shards[0]!r}, but no {INDEX}; get the index again")
    if (directory / SINGLE).is_symlink():
        raise RequestError(f"model {path!r}: {SINGLE} is a link to a file that is gone; get it again")
    if unindexed := sorted(file.name for file in directory.glob("*.safetensors")):
        raise RequestError(
            f"directory {path!r} is no model: it has no {SINGLE} and no {INDEX}, by which {unindexed[0]!r} "
            "would count; convert it to the layout of transformers"
        )
    pickled = [file.name for pattern in PICKLED_WEIGHTS for file in directory.glob(pattern)]
    if pickled:
        raise RequestError(
            f"model {path!r} has only pickled weights ({pickled[0]}), which can run code when read; "
            "convert it to safetensors first"
        )
    raise RequestError(f"directory {path!r} is no model: it has no *.safetensors")


def _check_index(directory: Path, weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse an index that is not of these shards: other programs go by it."""
    for name in sorted(weight_map.keys() | tensors.keys()):
        said = weight_map.get(name)
        found = tensors[name].file.name if name in tensors else None
        if said != found:
            raise RequestError(
                f"model {str(directory)!r}: its index {INDEX} is not of these files: tensor {name!r} is "
                f"{_place(said)} by the index, and {_place(found)} in truth; get index and shards again"
            )


def _place(file: str | None) -> str:
    return "nowhere" if file is None else f"in {file!r}"


def read_header(file: Path) -> list[StoredTensor]:
    """Read the tensors of a safetensors file, in the order of their bytes.

    Raises:
        RequestError: the file is cut off, or is no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(len(LFS_POINTER))
            length = int.from_bytes(first[:8], "little")
            stream.seek(8)
            text = stream.read(length) if length <= min(size - 8, LONGEST_HEADER) else b""
    except OSError as error:
        raise RequestError(f"{str(file)!r} cannot be read: {error.strerror}") from error
    if first == LFS_POINTER:
        raise RequestError(f"{str(file)!r} is a git-lfs pointer, not the weights; run `git lfs pull`")
    if not text:
        raise _no_safetensors(file, "it is empty" if size == 0 else "it ends before its header does")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if not text.startswith(b"{"):
            raise ValueError("it is no JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its '__metadata__' is not text alone")
        tensors = [_tensor(file, name, entry, 8 + length) for name, entry in header.items()]
    except (ValueError, RecursionError) as error:
        raise _no_safetensors(file, f"its header is unreadable ({error})") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    at = 8 + length  # the tensors fill the file's data, one after the other
    for tensor in tensors:
        if tensor.start != at:
            raise _no_safetensors(file, f"the bytes of tensor {tensor.name!r} overlap others or leave a gap")
        at = tensor.end
    if at > size:
        raise RequestError(f"{str(file)!r} is cut off: it has {size} bytes of {at}; get it again")
    if at < size:
        raise _no_safetensors(file, f"{size - at} bytes follow its last tensor")
    return tensors


def _tensor(file: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """Return a header's entry; raise ValueError if it is none."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            if dtype not in BITS:
                raise ValueError(f"tensor {name!r} is of the unknown type {dtype!r}")
            if not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError(f"tensor {name!r} has the shape {shape}")
            if (end - start) * 8 != math.prod(shape) * BITS[dtype]:
                raise ValueError(f"tensor {name!r} of shape {shape} and type {dtype} has {end - start} bytes")
            return StoredTensor(name, file, dtype, tuple(shape), data + start, data + end)
    raise ValueError(f"tensor {name!r} lacks its type, shape or offsets")


def header_of(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> tuple[bytes, int]:
    """Return the beginning of a safetensors file, and the number of bytes that follow it.

    Args:
        tensors: name, type as in `BITS`, shape and bytes of each, in the order in which they will follow.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, num_bytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, at


def _no_safetensors(file: Path, reason: str) -> RequestError:
    return RequestError(f"{str(file)!r} is no safetensors file: {reason}; get it again")
