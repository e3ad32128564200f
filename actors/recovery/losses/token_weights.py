"""Which tokens of a batch each loss counts.

All terms of a batch count the same tokens as `TrainingData.num_tokens` does, so
that one denominator serves them all.
"""

import torch
from torch import Tensor

from actors.data import TokenBatch
from actors.recovery.losses.distillation import Counted


def predicting(batch: TokenBatch) -> Counted:
    """The tokens from which a target is predicted: what a causal language model's loss counts."""
    targets_BT = batch.targets_BT if batch.targets_BT is not None else batch.mask_BT
    if targets_BT is None:
        targets_BT = torch.ones_like(batch.input_ids_BT)
    return Counted(_of_next(targets_BT).float(), batch.denominator)


def distilled(batch: TokenBatch) -> Counted:
    """What a distillation counts: all tokens but padding, or `predicting` where the batch has targets.

    So with answers to learn, neither prompts nor what follows the last target count.
    """
    if batch.targets_BT is not None:
        return predicting(batch)
    return Counted(None if batch.mask_BT is None else batch.mask_BT.float(), batch.denominator)


def next_ids(batch: TokenBatch) -> Tensor:
    """The token id after each token [B, T]; 0 after the last."""
    return _of_next(batch.input_ids_BT)


def _of_next(values_BT: Tensor) -> Tensor:
    return torch.cat([values_BT[:, 1:], torch.zeros_like(values_BT[:, :1])], dim=1)
