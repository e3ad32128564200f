"""Packing of documents and conversations into the sequences of a training run.

Shape letters: S sequences of a data set, B sequences of a batch, T tokens of a sequence.
"""

import fcntl
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import LongTensor, Tensor

from actors.contracts import NO_ROWS, RowCounts
from actors.data.batches import TokenBatch

T = TypeVar("T")

PADDING = 0
"""Token id of padding. Any will do: no token attends to it, and no loss counts it."""

Count = Callable[[], RowCounts]
ROWS = "rows.json"
COLUMN_DTYPES = {"ids": np.int32, "starts": np.uint8, "targets": np.uint8}


@dataclass(frozen=True)
class TokenSequence:
    """One sequence.

    Attributes:
        ids: token ids [T].
        starts: 1 where a document begins [T]; None if the sequence is one.
        targets: 1 for tokens that are to be learnt [T]; None for all but those that begin a document.
    """

    ids: np.ndarray
    starts: np.ndarray | None = None
    targets: np.ndarray | None = None


def cut_into_blocks(
    documents: Iterable[list[int]], sequence_length: int, isolated: bool
) -> Iterator[TokenSequence]:
    """Fill blocks of `sequence_length` tokens with one document after another.

    A document that does not fit goes on in the next block. What is left at the
    end and fills no block is dropped. If `isolated`, the blocks mark where documents
    begin, so that no token need see another document.
    """
    ids: list[int] = []
    starts: list[int] = []
    for document in documents:
        ids += document
        starts += [1, *[0] * (len(document) - 1)] if document else []
        full = len(ids) // sequence_length * sequence_length
        for at in range(0, full, sequence_length):
            starts[at] = 1
            block = slice(at, at + sequence_length)
            yield TokenSequence(np.array(ids[block]), np.array(starts[block]) if isolated else None)
        del ids[:full], starts[:full]


def pack_sequences(sequences: Iterable[TokenSequence], sequence_length: int) -> Iterator[TokenSequence]:
    """Put as many sequences into one as fit into `sequence_length` tokens, in order; none is cut."""
    waiting: list[TokenSequence] = []
    for sequence in sequences:
        if waiting and sum(len(s.ids) for s in waiting) + len(sequence.ids) > sequence_length:
            yield _concatenate(waiting)
            waiting = []
        waiting.append(sequence)
    if waiting:
        yield _concatenate(waiting)


def shuffled(items: Iterable[T], seed: int, buffer_size: int) -> Iterator[T]:
    """Yield the items in an order drawn from `seed`, `buffer_size` of them in memory at a time."""
    draw = random.Random(seed)
    buffer: list[T] = []
    for item in items:
        buffer.append(item)
        if len(buffer) > buffer_size:
            place = draw.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    draw.shuffle(buffer)
    yield from buffer


def _concatenate(sequences: list[TokenSequence]) -> TokenSequence:
    starts = [np.arange(len(sequence.ids)) == 0 for sequence in sequences]
    return TokenSequence(
        np.concatenate([sequence.ids for sequence in sequences]),
        np.concatenate(starts),
        np.concatenate([sequence.targets for sequence in sequences]),
    )


def take_tokens(sequences: Iterable[TokenSequence], max_tokens: int) -> Iterator[TokenSequence]:
    """Yield the first sequences, together at most `max_tokens` tokens."""
    for sequence in sequences:
        max_tokens -= len(sequence.ids)
        if max_tokens < 0:
            return
        yield sequence


class PackedData:
    """Sequences of any length end to end, in memory or in mapped files; a `TrainingData`.

    Batches are padded on the right to their longest sequence.

    Args:
        columns: `ids` [sum of T] and, where the sequences have them, `starts` and `targets` alike.
        bounds: S + 1 positions; sequence s is from `bounds[s]` to `bounds[s + 1]`.
        rows: those of the text that the sequences were made of.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], bounds: np.ndarray, rows: RowCounts = NO_ROWS):
        self._columns, self.rows = columns, rows
        self._bounds = bounds
        self._num_targets_S = torch.from_numpy(np.diff(bounds))
        if "targets" in columns:
            self._num_targets_S = torch.from_numpy(
                np.add.reduceat(columns["targets"], bounds[:-1], dtype=np.int64)
            )

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def lengths_S(self) -> Tensor:
        return torch.from_numpy(np.diff(self._bounds))

    @property
    def largest_id(self) -> int:
        return int(self._columns["ids"].max())

    def num_tokens(self, chosen_B: LongTensor) -> int:
        return int(self._num_targets_S[chosen_B].sum())

    def batch(self, chosen_B: LongTensor) -> TokenBatch:
        lengths_B = self.lengths_S[chosen_B]
        mask_BT = (torch.arange(int(lengths_B.max())) < lengths_B[:, None]).long()
        starts_BT = self._gather("starts", chosen_B, mask_BT)
        targets_BT = self._gather("targets", chosen_B, mask_BT)
        if targets_BT is None and starts_BT is not None:
            targets_BT = mask_BT * (1 - starts_BT)
        position_ids_BT = None
        if starts_BT is not None:
            # The distance from the start of the document; 0 for padding, each token of which stands alone.
            index_T = torch.arange(starts_BT.shape[1])
            position_ids_BT = (index_T - (index_T * starts_BT).cummax(dim=1).values) * mask_BT
        return TokenBatch(
            input_ids_BT=self._gather("ids", chosen_B, mask_BT),
            mask_BT=None if mask_BT.all() else mask_BT,
            targets_BT=targets_BT,
            position_ids_BT=position_ids_BT,
            sequences_B=chosen_B,
        )

    def _gather(self, name: str, chosen_B: LongTensor, mask_BT: Tensor) -> Tensor | None:
        if name not in self._columns:
            return None
        gathered = torch.full_like(mask_BT, PADDING)
        flat = [self._columns[name][self._bounds[s] : self._bounds[s + 1]] for s in chosen_B.tolist()]
        gathered[mask_BT.bool()] = torch.from_numpy(np.concatenate(flat).astype(np.int64))
        return gathered


def memory_mapped(
    make: Callable[[], Iterable[TokenSequence]], directory: Path, count: Count = RowCounts
) -> PackedData:
    """Keep the sequences in files under `directory` that are mapped rather than read.

    If the directory is there it is used as it is, and nothing is made anew. It appears whole or
    not at all. Of several processes of a node one makes it and the others wait for that one.

    Args:
        count: called when all sequences are made; what it returns is kept with them.
    """
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_name(f".lock-{directory.name}")):
            if not directory.is_dir():
                _make(make, directory, count)
    lengths = np.load(directory / "lengths.npy")
    columns = {
        name: np.memmap(directory / name, dtype=kind, mode="r")
        for name, kind in COLUMN_DTYPES.items()
        if (directory / name).is_file()
    }
    noted = directory / ROWS
    rows = RowCounts(**json.loads(noted.read_text())) if noted.is_file() else NO_ROWS
    return PackedData(columns, _bounds(lengths), rows)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        # Not every shared file system has locks: without one, processes write the same, and one of them wins.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _make(make: Callable[[], Iterable[TokenSequence]], directory: Path, count: Count) -> None:
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".writing-"))
    try:
        _write(make(), scratch)
        (scratch / ROWS).write_text(json.dumps(asdict(count())))
        os.rename(scratch, directory)
    except OSError:
        # Another process wrote the same meanwhile: its directory is as good.
        if not directory.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(sequences: Iterable[TokenSequence], directory: Path) -> None:
    lengths: list[int] = []
    with ExitStack() as stack:
        files = {}
        for sequence in sequences:
            lengths.append(len(sequence.ids))
            for name, kind in COLUMN_DTYPES.items():
                if (column := getattr(sequence, name)) is None:
                    continue
                if name not in files:
                    files[name] = stack.enter_context((directory / name).open("wb"))
                files[name].write(column.astype(kind).tobytes())
    np.save(directory / "lengths.npy", np.array(lengths, dtype=np.int64))


def _bounds(lengths: list[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
