"""Sequences packed as those of a training are, for tests that have them in memory."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from actors.data import PackedData, TokenSequence, memory_mapped


def packed(sequences: Iterable[TokenSequence]) -> PackedData:
    """Pack the sequences; their files are gone, but stay mapped for as long as the result is there."""
    with TemporaryDirectory() as directory:
        return memory_mapped(lambda: sequences, Path(directory) / "tokens")


def packed_blocks(ids_ST: Tensor) -> PackedData:
    """Pack full blocks of running text."""
    return packed(TokenSequence(ids_T.numpy()) for ids_T in ids_ST)
