"""Training batches: sequences by number, gathered into batches of tokens.

Shape letters: S sequences of a data set, B sequences of a batch, T tokens, D hidden, K most likely tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import LongTensor, Tensor

from actors.contracts import RowCounts


@dataclass(frozen=True)
class TopK:
    """The teacher's K most likely next tokens at every token.

    Attributes:
        ids_BTK: their token ids, the most likely first.
        log_probabilities_BTK: of the whole vocabulary's softmax, at temperature 1, in nats.
    """

    ids_BTK: Tensor
    log_probabilities_BTK: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "TopK":
        """Return them on that device."""
        return TopK(
            self.ids_BTK.to(device, non_blocking=non_blocking),
            self.log_probabilities_BTK.to(device, non_blocking=non_blocking),
        )


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
        sequences_B: index of each row in the `TrainingData` that gave it; None where rows come from no
            such data. It stays on the CPU.
        teacher_BTD: the teacher's last hidden state after the final norm, from a cache; None where it
            has to be computed.
        entering_BTD: the hidden state that enters the first block that the student computes with
            gradient, from a cache; None where it has to be computed.
        teacher_topk: the teacher's most likely tokens, from a cache; None where its logits are exact.
    """

    input_ids_BT: Tensor
    mask_BT: Tensor | None = None
    targets_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    denominator: float | None = None
    sequences_B: Tensor | None = None
    teacher_BTD: Tensor | None = None
    entering_BTD: Tensor | None = None
    teacher_topk: TopK | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "TokenBatch":
        """Return the batch on that device.

        Args:
            non_blocking: do not wait for the copies, which asks for pinned tensors.
        """
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, (Tensor, TopK)) and name != "sequences_B"
        }
        return replace(self, **moved)

    def pinned(self) -> "TokenBatch":
        """Return the batch in pinned memory, from which a GPU copies while the host goes on."""
        pinned: dict[str, Any] = {
            name: value.pin_memory()
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "sequences_B"
        }
        if self.teacher_topk is not None:
            top = self.teacher_topk
            pinned["teacher_topk"] = TopK(top.ids_BTK.pin_memory(), top.log_probabilities_BTK.pin_memory())
        return replace(self, **pinned)

    def one_row(self) -> "TokenBatch":
        """Return the batch as one row without padding; its rows must hold documents, told apart by positions.

        So kernels that take documents of any length (varlen) need no mask.
        """
        kept_BT = (torch.ones_like(self.input_ids_BT) if self.mask_BT is None else self.mask_BT).bool()
        joined: dict[str, Any] = {
            name: value[kept_BT][None]
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and "_BT" in name
        }
        if self.teacher_topk is not None:
            top = self.teacher_topk
            joined["teacher_topk"] = TopK(
                top.ids_BTK[kept_BT][None], top.log_probabilities_BTK[kept_BT][None]
            )
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
