"""Training batches: sequences by number, gathered into batches of tokens.

Shape letters: S sequences of a data set, B sequences of a batch, T tokens.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import LongTensor, Tensor

from actors.contracts import NO_ROWS, RowCounts


@dataclass(frozen=True)
class TokenBatch:
    """A batch of token sequences, all T long.

    Attributes:
        input_ids_BT: token ids.
        mask_BT: 1 for tokens, 0 for padding; None when there is no padding.
        targets_BT: 1 for tokens that are to be predicted, 0 for prompts, padding
            and first tokens of documents; None when every token but the first is.
        position_ids_BT: positions within each document; None when a sequence is one document.
            Attention must then stay within documents, which transformers derives from
            the positions if there is no attention mask; `mask_BT` is for the losses only.
        denominator: what sums over tokens are divided by; None for the number of
            tokens in this batch. With the tokens of a whole step, divided by its number of
            micro-batches, the mean over micro-batches is the mean over the step's tokens.
    """

    input_ids_BT: Tensor
    mask_BT: Tensor | None = None
    targets_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    denominator: float | None = None

    def to(self, device: torch.device) -> "TokenBatch":
        """Return the batch on that device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def one_row(self) -> "TokenBatch":
        """Return the batch as one row without padding; its rows must hold documents, told apart by positions.

        So kernels that take documents of any length (varlen) need no mask.
        """
        kept_BT = torch.ones_like(self.input_ids_BT) if self.mask_BT is None else self.mask_BT
        joined = {
            name: value[kept_BT.bool()][None]
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and "_BT" in name
        }
        return replace(self, **{**joined, "mask_BT": None})


class TrainingData(Protocol):
    """Sequences that a training run draws its batches from."""

    def __len__(self) -> int:
        """Return S, the number of sequences."""

    def batch(self, chosen_B: LongTensor) -> TokenBatch:
        """Return those sequences as one batch."""

    def num_tokens(self, chosen_B: LongTensor) -> int:
        """Return how many tokens of those sequences the loss is a mean over: all, or those of answers."""

    @property
    def lengths_S(self) -> Tensor:
        """Tokens of each sequence that the model reads; padding is not among them."""

    @property
    def largest_id(self) -> int:
        """The largest token id that occurs."""

    @property
    def rows(self) -> RowCounts:
        """The rows that the sequences were made of, and those that were left out."""


@dataclass(frozen=True)
class BlockData:
    """Full blocks of running text, every token of which counts."""

    blocks_ST: Tensor
    rows: RowCounts = NO_ROWS

    def __len__(self) -> int:
        return len(self.blocks_ST)

    def batch(self, chosen_B: LongTensor) -> TokenBatch:
        return TokenBatch(self.blocks_ST[chosen_B])

    def num_tokens(self, chosen_B: LongTensor) -> int:
        return self.blocks_ST[chosen_B].numel()

    @property
    def lengths_S(self) -> Tensor:
        return torch.full((len(self),), self.blocks_ST.shape[1])

    @property
    def largest_id(self) -> int:
        return int(self.blocks_ST.max())
