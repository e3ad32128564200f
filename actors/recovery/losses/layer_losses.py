"""Distances between the layers of student and teacher: hidden states and attention matrices (IteRABRe §3.2).

Every function returns a scalar, the sum of a value per token over the tokens that count, divided as
`TokenWeights` defines; what the value of a token is a mean over stands at each function.
B sequences, T tokens, D hidden, H heads.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from actors.recovery.losses.token_weights import ALL_TOKENS, TokenWeights


def hidden_mse(
    student_BTD: Tensor, teacher_BTD: Tensor, weights: TokenWeights = ALL_TOKENS, normalised: bool = False
) -> Tensor:
    """Return the squared distance of hidden states; a token's value is the mean over D (IteRABRe §3.2).

    Args:
        normalised: divide each token's value by the mean over D of the teacher's squares, so that it is
            |h_S − h_T|² / |h_T|². Raw states grow from block to block, and those of the last ones, and of
            the few tokens that models use as sinks, outweigh all others.
    """
    num_tokens, width = student_BTD[..., 0].numel(), student_BTD.shape[-1]
    weights_BT = weights.weights_BT
    if normalised:
        squares_BT = torch.linalg.vector_norm(teacher_BTD, dim=-1, dtype=torch.float32).square() / width
        scale_BT = squares_BT.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
        weights_BT = scale_BT if weights_BT is None else weights_BT * scale_BT
    total = _WeightedSquares.apply(student_BTD, teacher_BTD, weights_BT)
    return weights.divided(total / width, num_tokens)


def attention_mse(
    student_BHTT: Tensor,
    teacher_BHTT: Tensor,
    weights: TokenWeights = ALL_TOKENS,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Return the squared distance of attention matrices (IteRABRe §3.2).

    A token's value is the mean over heads and over the keys of its sequence. With
    `mask_BT` (1 for tokens, 0 for padding), keys that are padding do not count.
    """
    batch, heads, num_queries, num_keys = student_BHTT.shape
    weights_B1T = None if weights.weights_BT is None else weights.weights_BT[:, None]
    if mask_BT is not None:
        keys_BT = mask_BT.to(student_BHTT.dtype)
        student_BHTT = student_BHTT * keys_BT[:, None, None]
        teacher_BHTT = teacher_BHTT * keys_BT[:, None, None]
        share_B11 = num_keys / keys_BT.sum(-1).clamp(min=1)[:, None, None]
        weights_B1T = share_B11.expand(-1, 1, num_queries) if weights_B1T is None else weights_B1T * share_B11
    total = _WeightedSquares.apply(student_BHTT, teacher_BHTT, weights_B1T)
    return weights.divided(total / (heads * num_keys), batch * num_queries)


class _WeightedSquares(torch.autograd.Function):
    """Σ w |s − t|², the norm being over the last dimension, in fp32.

    Only the difference is kept, and each direction is one pass over it: attention
    matrices are larger than all else in a block.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        difference = student.float() - teacher.float()
        ctx.save_for_backward(difference, weights)
        ctx.dtype = student.dtype
        squares = torch.linalg.vector_norm(difference, dim=-1).square()
        return squares.sum() if weights is None else (squares * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        difference, weights = ctx.saved_tensors
        scale = 2 * above if weights is None else 2 * above * weights[..., None]
        return (difference * scale).to(ctx.dtype), None, None
