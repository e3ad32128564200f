"""Token sequences packed into trees, so that what they begin with in common stands there once.

A tree is one row of a batch: a node is a token after all its ancestors, and may
attend to them and to itself alone. Its position is its depth. Whatever a causal
model computes at a node is what it computes at that token of any sequence that
passes through it.

Shape letters: B rows, Q nodes of a row, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROW = 512
"""Nodes up to which sequences share a row even if they have nothing in common: they need no padding there."""


@dataclass
class PrefixTree:
    """Sequences added in lexicographic order.

    `tokens` and `depths` describe the nodes, `paths[i]` lists the nodes of the
    i-th sequence from the root, `members[i]` is what it was called when added.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    members: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, member: int, sequence: Sequence[int], shared: int) -> None:
        """Add a sequence whose first `shared` tokens are those of the one added before."""
        first = len(self.tokens)
        trunk = self.paths[-1][:shared] if shared else []
        self.tokens += sequence[shared:]
        self.depths += range(shared, len(sequence))
        self.paths.append([*trunk, *range(first, len(self.tokens))])
        self.members.append(member)

    def sees(self) -> Tensor:
        """Return Boolean [Q, Q]: true where the row's node may attend to the column's."""
        seen_QQ = torch.zeros(len(self), len(self), dtype=torch.bool)
        first = 0
        for path in self.paths:
            last = path[-1] + 1
            if last <= first:  # the sequence begins another one, added before, or equals it
                continue
            trunk = [node for node in path if node < first]
            seen_QQ[first:last, trunk] = True
            seen_QQ[first:last, first:last] = torch.ones(last - first, last - first, dtype=torch.bool).tril()
            first = last
        return seen_QQ

    @property
    def is_chain(self) -> bool:
        """True if the row is one sequence, so that plain causal attention serves it."""
        return self.depths[-1] == len(self) - 1


def build_trees(sequences: Sequence[list[int]], most_nodes: int | None) -> list[PrefixTree]:
    """Return all sequences in as few nodes as their order allows.

    A sequence joins the tree of its predecessor, in lexicographic order, while
    the row has at most `ROW` nodes; beyond that only if at least half of it is
    there already, and the row stays below twice its length: attention within a
    row is quadratic. `most_nodes` bounds a tree of several sequences; 0 keeps
    every sequence to itself, None sets no bound.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    trees: list[PrefixTree] = []
    before: Sequence[int] = ()
    for member in order:
        sequence = sequences[member]
        shared = common_prefix(before, sequence)
        if not trees or not _joins(trees[-1], sequence, shared, most_nodes):
            trees.append(PrefixTree())
            shared = 0
        trees[-1].add(member, sequence, shared)
        before = sequence
    return trees


def _joins(tree: PrefixTree, sequence: Sequence[int], shared: int, most_nodes: int | None) -> bool:
    nodes = len(tree) + len(sequence) - shared
    if shared == len(sequence):  # the same sequence once more
        return True
    if most_nodes is not None and nodes > most_nodes:
        return False
    return nodes <= ROW or (2 * shared >= len(sequence) and nodes <= 2 * len(sequence))


def run_rows(
    body: Callable[..., Tensor], rows: Sequence[PrefixTree], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return hidden states [B, Q, D] of rows of nodes; those after a row's last node mean nothing.

    Args:
        body: from token ids [B, Q], and a mask and positions where a row branches, to hidden states.
        dtype: that of the mask, which the model adds to its attention scores.
    """
    width = max(len(tree) for tree in rows)
    ids_BQ = torch.tensor([_padded(tree.tokens, width) for tree in rows], device=device)
    if all(tree.is_chain for tree in rows):
        return body(ids_BQ)
    positions_BQ = torch.tensor([_padded(tree.depths, width) for tree in rows], device=device)
    # Padding sees itself, since a softmax over nothing is not a number.
    sees_BQQ = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    for row, tree in enumerate(rows):
        sees_BQQ[row, : len(tree), : len(tree)] = tree.sees()
    mask_BQQ = torch.zeros(sees_BQQ.shape, dtype=dtype, device=device)
    mask_BQQ.masked_fill_(~sees_BQQ.to(device), torch.finfo(dtype).min)
    return body(ids_BQ, attention_mask=mask_BQQ[:, None], position_ids=positions_BQ)


def _padded(values: list[int], length: int) -> list[int]:
    return values + [0] * (length - len(values))


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the number of tokens that both begin with."""
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)
