"""The sequences of training data in shards, and the teacher's states of them as an artifact."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from actors.artifacts import local_path, publish_file
from actors.contracts import ArtifactRef, FileRef, Progress, TeachResult, TeachSpec
from actors.data.teacher_states import INDEX, write_index
from actors.errors import TooLargeError
from actors.models import text_config
from actors.models.loading.load import load_config

SHARD_TOKENS = 2**16
"""Tokens of a shard, at least: some tens to hundreds of MB of states."""

GB = 1e9


@dataclass(frozen=True)
class Shard:
    """Sequences `first` to `first + count - 1` of the training data."""

    number: int
    first: int
    count: int


Compute = Callable[[Sequence[Shard]], Iterator[tuple[Shard, FileRef]]]
"""Computes shards somewhere and yields each with its published file, in any order."""


def batch_sizes(spec: TeachSpec) -> dict[str, Any]:
    """Return how a teaching that lacks memory is tried again; see `once_more_with_less`."""
    half = spec.batch_size // 2
    return {
        "size": spec,
        "smaller": replace(spec, batch_size=half) if half else None,
        "what": f"teaching by {spec.model.path!r}",
        "setting": "recovery.micro_batch_size",
        "remedy": "lower recovery.sequence_length, or use a device with more memory",
    }


def shards_of(lengths_S: Tensor) -> list[Shard]:
    """Return all sequences in shards, each the fewest that have `SHARD_TOKENS` tokens; the last has the rest.

    They follow from the data alone: the artifact is the same for any number of actors.
    """
    shards: list[Shard] = []
    first, tokens = 0, 0
    for sequence, length in enumerate(lengths_S.tolist()):
        tokens += length
        if tokens >= SHARD_TOKENS or sequence + 1 == len(lengths_S):
            shards.append(Shard(len(shards), first, sequence + 1 - first))
            first, tokens = sequence + 1, 0
    return shards


def needed_bytes(spec: TeachSpec, num_tokens: int) -> int:
    """Return the size of the states of so many tokens."""
    return num_tokens * spec.bytes_per_token(text_config(load_config(spec.model)).hidden_size)


def check_disk(spec: TeachSpec, uri: str, needed: int) -> None:
    """Check that the states are no larger than they may be, and fit where they go if that is a local disk.

    Raises:
        TooLargeError: they are too large; names place, bytes and remedies.
    """
    taken = f"the states of teacher {spec.model.path!r} take {needed / GB:.3g} GB"
    remedy = (
        "set recovery.teacher_cache to topk or off, or recovery.teacher_cache_dtype to bfloat16, or give "
        "less data"
    )
    if spec.max_gb is not None and needed > spec.max_gb * GB:
        raise TooLargeError(
            f"{taken}, and recovery.teacher_cache_gb allows {spec.max_gb:g}; raise it, {remedy}"
        )
    target = local_path(uri)
    if target is None:
        return
    existing = next(place for place in (target, *target.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise TooLargeError(
            f"{taken}, but {uri} has {free / GB:.3g} GB free; free some space, choose another storage.path, "
            f"{remedy}"
        )


def run_shards(
    spec: TeachSpec, lengths_S: Tensor, compute: Compute, uri: str, progress: Progress
) -> TeachResult:
    """Compute the states of all sequences shard by shard; return them as an artifact at `uri`.

    Raises:
        TooLargeError: they do not fit on the disk; nothing is computed then.
    """
    num_tokens = int(lengths_S.sum())
    check_disk(spec, uri, needed_bytes(spec, num_tokens))
    shards = shards_of(lengths_S)
    files: dict[int, FileRef] = {}
    done = 0
    for shard, file in compute(shards):
        files[shard.number] = file
        done += int(lengths_S[shard.first : shard.first + shard.count].sum())
        progress(done, num_tokens, "tokens")
    with TemporaryDirectory(prefix="iterabre-teacher-") as scratch:
        index = Path(scratch) / INDEX
        write_index(index, len(lengths_S), num_tokens, [shard.first for shard in shards])
        ordered = (publish_file(index, uri), *(files[shard.number] for shard in shards))
    num_bytes = sum(file.size_bytes for file in ordered)
    return TeachResult(ArtifactRef(uri, ordered), len(lengths_S), num_tokens, num_bytes)
