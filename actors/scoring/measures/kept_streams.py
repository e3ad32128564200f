"""The scored model's own stream at each layer, kept for candidates that are scored on a sequence later.

Shape letters: G sequences of one length, T tokens, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class KeptStreams:
    """What enters each block, of the sequences for which there is room.

    A candidate that is scored on a sequence after others begins at its own layer
    with what is kept: the layers before it are not passed again.

    Args:
        num_bytes: what they may take.
        num_points: points of the stream that a sequence has, one a block.

    Sequences are named by their token ids (`name_of`).
    """

    def __init__(self, num_bytes: int, num_points: int):
        self.num_bytes, self._left, self._num_points = num_bytes, num_bytes, num_points
        self._points: dict[bytes, list[Tensor]] = {}
        self._sizes: dict[bytes, int] = {}

    def known(self, names: Sequence[bytes]) -> int:
        """Return at how many blocks, from the first on, the stream of every sequence is known."""
        return min(len(self._points.get(name, ())) for name in names)

    def entering(self, names: Sequence[bytes], index: int) -> Tensor:
        """Return what enters block `index`, of sequences of one length: [G, T, D]."""
        return torch.stack([self._points[name][index] for name in names])

    def keep(self, names: Sequence[bytes], index: int, hidden_GTD: Tensor) -> None:
        """Keep what enters block `index`, if there is room for the sequence at all blocks."""
        for name, hidden_TD in zip(names, hidden_GTD, strict=True):
            size = hidden_TD.nbytes * self._num_points
            if index == 0 and name not in self._points and size <= self._left:
                self._points[name], self._sizes[name] = [], size
                self._left -= size
            points = self._points.get(name)
            if points is not None and len(points) == index < self._num_points:
                points.append(hidden_TD.clone())

    def release(self, names: Sequence[bytes]) -> None:
        """Make room: these sequences will not come again."""
        for name in names:
            if self._points.pop(name, None) is not None:
                self._left += self._sizes.pop(name)


def name_of(ids_T: Tensor) -> bytes:
    """Return what a sequence is kept by."""
    return ids_T.cpu().numpy().tobytes()
