"""Token weights: the tokens of a batch that each loss counts.

All terms of a batch count the same tokens as `TrainingData.num_tokens` does, so
that one denominator serves them all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.data import TokenBatch


@dataclass(frozen=True)
class TokenWeights:
    """Which tokens a loss sums over, and what divides the sum.

    Attributes:
        weights_BT: 1 for tokens that count, 0 for others; None when all do.
        denominator: the divisor; None for the number of tokens that count.
        all_but_last: the tokens that count are all but the last of each row.
    """

    weights_BT: Tensor | None = None
    denominator: float | None = None
    all_but_last: bool = False

    def mean(self, values_BT: Tensor) -> Tensor:
        """Sum the values that count, and divide."""
        weighted_BT = values_BT if self.weights_BT is None else values_BT * self.weights_BT
        return self.divided(weighted_BT.sum(), values_BT.numel())

    def rows(self, tensor_BTX: Tensor) -> Tensor:
        """Return the vectors of the tokens that count [N, X], in order."""
        if self.all_but_last:
            # How many there are is known here; a mask would have to be read from the device.
            return tensor_BTX[:, :-1].flatten(0, 1)
        rows_NX = tensor_BTX.flatten(0, 1)
        return rows_NX if self.weights_BT is None else rows_NX[self.weights_BT.flatten().bool()]

    def divided(self, total: Tensor, num_tokens: int) -> Tensor:
        """Divide a sum over the tokens that count, `num_tokens` being all of the batch."""
        if self.denominator is not None:
            return total / self.denominator
        return total / (num_tokens if self.weights_BT is None else self.weights_BT.sum().clamp(min=1))


ALL_TOKENS = TokenWeights()


def prediction_weights(batch: TokenBatch) -> TokenWeights:
    """Return the tokens from which a target is predicted: what a causal language model's loss counts."""
    targets_BT = batch.targets_BT if batch.targets_BT is not None else batch.mask_BT
    all_count = targets_BT is None
    if targets_BT is None:
        targets_BT = torch.ones_like(batch.input_ids_BT)
    return TokenWeights(_shift_left(targets_BT).float(), batch.denominator, all_but_last=all_count)


def distillation_weights(batch: TokenBatch) -> TokenWeights:
    """Return what a distillation counts: all tokens but padding; with targets, `prediction_weights`.

    So with answers to learn, neither prompts nor what follows the last target count.
    """
    if batch.targets_BT is not None:
        return prediction_weights(batch)
    return TokenWeights(None if batch.mask_BT is None else batch.mask_BT.float(), batch.denominator)


def next_ids(batch: TokenBatch) -> Tensor:
    """Return the token id after each token [B, T]; 0 after the last."""
    return _shift_left(batch.input_ids_BT)


def _shift_left(values_BT: Tensor) -> Tensor:
    return torch.cat([values_BT[:, 1:], torch.zeros_like(values_BT[:, :1])], dim=1)
