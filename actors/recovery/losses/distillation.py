"""Recovery's losses: sums over the tokens that count, divided by one denominator.

Every function returns a scalar, the sum over the counted tokens of a value per
token, divided by `counted`'s denominator: the mean over a batch, or a micro-batch's
share of the mean over an optimizer step, however unequal the micro-batches are.
What the value of a token is a mean over is said at each function.
B sequences, T tokens, D hidden, H heads, V vocabulary, N any number of tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from actors.recovery.losses.chunks import Head, sum_over_chunks
from actors.recovery.losses.logit_losses import LogitLoss


@dataclass(frozen=True)
class Counted:
    """Which tokens a loss sums over, and what divides the sum.

    Attributes:
        weights_BT: 1 for tokens that count, 0 for others; None when all do.
        denominator: the divisor; None for the number of tokens that count.
    """

    weights_BT: Tensor | None = None
    denominator: float | None = None

    def mean(self, values_BT: Tensor) -> Tensor:
        """The sum of the values that count, divided."""
        weighted_BT = values_BT if self.weights_BT is None else values_BT * self.weights_BT
        return self.divided(weighted_BT.sum(), values_BT.numel())

    def rows(self, tensor_BTX: Tensor) -> Tensor:
        """The vectors of the tokens that count [N, X], in order."""
        rows_NX = tensor_BTX.flatten(0, 1)
        return rows_NX if self.weights_BT is None else rows_NX[self.weights_BT.flatten().bool()]

    def divided(self, total: Tensor, num_tokens: int) -> Tensor:
        """A sum over the tokens that count, `num_tokens` being all of the batch, divided."""
        if self.denominator is not None:
            return total / self.denominator
        return total / (num_tokens if self.weights_BT is None else self.weights_BT.sum().clamp(min=1))


EVERY_TOKEN = Counted()


def hidden_mse(student_BTD: Tensor, teacher_BTD: Tensor, counted: Counted = EVERY_TOKEN) -> Tensor:
    """Squared distance of hidden states; a token's value is the mean over D (IteRABRe §3.2)."""
    num_tokens, width = student_BTD[..., 0].numel(), student_BTD.shape[-1]
    total = _WeightedSquares.apply(student_BTD, teacher_BTD, counted.weights_BT)
    return counted.divided(total / width, num_tokens)


def attention_mse(
    student_BHTT: Tensor, teacher_BHTT: Tensor, counted: Counted = EVERY_TOKEN, mask_BT: Tensor | None = None
) -> Tensor:
    """Squared distance of attention matrices (IteRABRe §3.2).

    A token's value is the mean over heads and over the keys of its sequence. With
    `mask_BT` (1 for tokens, 0 for padding), keys that are padding do not count.
    """
    batch, heads, num_queries, num_keys = student_BHTT.shape
    weights_B1T = None if counted.weights_BT is None else counted.weights_BT[:, None]
    if mask_BT is not None:
        keys_BT = mask_BT.to(student_BHTT.dtype)
        student_BHTT = student_BHTT * keys_BT[:, None, None]
        teacher_BHTT = teacher_BHTT * keys_BT[:, None, None]
        share_B11 = num_keys / keys_BT.sum(-1).clamp(min=1)[:, None, None]
        weights_B1T = share_B11.expand(-1, 1, num_queries) if weights_B1T is None else weights_B1T * share_B11
    total = _WeightedSquares.apply(student_BHTT, teacher_BHTT, weights_B1T)
    return counted.divided(total / (heads * num_keys), batch * num_queries)


def gram_matrix(head_VD: Tensor) -> Tensor:
    """G = WᵀW / V [D, D] in fp32: all that a logit MSE needs to know of the LM head (DESIGN §6)."""
    weight_VD = head_VD.detach().float()
    return weight_VD.T @ weight_VD / weight_VD.shape[0]


def logit_mse_from_hidden(
    student_BTD: Tensor, teacher_BTD: Tensor, gram_DD: Tensor, counted: Counted = EVERY_TOKEN
) -> Tensor:
    """Squared distance of logits z = Wh without forming them; a token's value is the mean over V.

    Equal to MSE(W h_S, W h_T), since |W Δh|² / V = Δhᵀ G Δh: D² products a token
    instead of V·D. Valid only where the logits are exactly W h, and W is frozen
    and common to both models. Computed in fp32 whatever the type of the states.

    Args:
        student_BTD, teacher_BTD: after the final norm.
        gram_DD: `gram_matrix` of the common head.
    """
    difference_BTD = student_BTD.float() - teacher_BTD.float()
    with torch.autocast(difference_BTD.device.type, enabled=False):
        squares_BT = ((difference_BTD @ gram_DD) * difference_BTD).sum(-1)
    return counted.mean(squares_BT)


def logit_distance(
    student_BTD: Tensor,
    teacher_BTD: Tensor,
    heads: tuple[Head, Head],
    distance: LogitLoss,
    counted: Counted = EVERY_TOKEN,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Any row of `LOGIT_LOSSES` between the logits of student and teacher, for any head.

    Logits exist for a chunk of tokens at a time, and only for tokens that count.

    Args:
        student_BTD, teacher_BTD: after the final norm; D may differ.
        heads: the student's and the teacher's.
        distance: (student_NV, teacher_NV) → values of the tokens [N].
    """
    student_head, teacher_head = heads
    teacher_ND = counted.rows(teacher_BTD.detach())

    def chunk_sum(student_ND: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            teacher_NV = teacher_head(teacher_ND[rows]).float()
        return distance(student_head(student_ND).float(), teacher_NV).sum()

    total = sum_over_chunks(counted.rows(student_BTD), chunk_sum, student_head, chunk_tokens)
    return counted.divided(total, student_BTD[..., 0].numel())


def causal_lm(
    hidden_BTD: Tensor,
    next_ids_BT: Tensor,
    head: Head,
    counted: Counted = EVERY_TOKEN,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy of the next token, in nats; a token's value is that of the token after it.

    Args:
        hidden_BTD: after the final norm.
        next_ids_BT: the id that follows each token; anything where none counts.
    """
    targets_N = counted.rows(next_ids_BT[..., None])[:, 0]

    def chunk_sum(hidden_ND: Tensor, rows: slice) -> Tensor:
        return nn.functional.cross_entropy(head(hidden_ND).float(), targets_N[rows], reduction="sum")

    total = sum_over_chunks(counted.rows(hidden_BTD), chunk_sum, head, chunk_tokens)
    return counted.divided(total, next_ids_BT.numel())


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
