"""Distillation losses: squared distances between what a teacher and a student compute.

Every function returns a scalar and documents what it is a mean over. A mask
(`mask_BT`, 1 for tokens that count) leaves padding out of the mean; None counts
every token. B sequences, T tokens, D hidden, H heads, V vocabulary, N any
number of tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""The model's own way from final hidden states [.., D] to logits [.., V]."""

CHUNK_TOKENS = 256


def hidden_mse(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Squared distance of hidden states, mean over tokens and D (IteRABRe §3.2)."""
    return _mean_over_tokens(_squares(student_BTD, teacher_BTD).mean(-1), mask_BT)


def attention_mse(student_BHTT: Tensor, teacher_BHTT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Squared distance of attention matrices, mean over heads, query and key tokens (IteRABRe §3.2).

    With a mask, pairs in which the query or the key is padding do not count.
    """
    squares_BTT = _squares(student_BHTT, teacher_BHTT).mean(1)
    if mask_BT is None:
        return squares_BTT.mean()
    pairs_BTT = mask_BT[:, :, None] * mask_BT[:, None, :]
    return _mean_over_tokens(squares_BTT, pairs_BTT)


def gram_matrix(head_VD: Tensor) -> Tensor:
    """G = WᵀW / V [D, D] in fp32: all that a logit MSE needs to know of the LM head (DESIGN §6)."""
    weight_VD = head_VD.detach().float()
    return weight_VD.T @ weight_VD / weight_VD.shape[0]


def logit_mse_from_hidden(difference_BTD: Tensor, gram_DD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Squared distance of logits z = Wh, mean over tokens and vocabulary, without forming them.

    Equal to MSE(W h_S, W h_T), since |W Δh|² / V = Δhᵀ G Δh: D² products a token
    instead of V·D. Valid only where the logits are exactly W h, and W is frozen
    and common to both models.

    Args:
        difference_BTD: h_S − h_T in fp32, after the final norm.
        gram_DD: `gram_matrix` of the common head.
    """
    return _mean_over_tokens(((difference_BTD @ gram_DD) * difference_BTD).sum(-1), mask_BT)


def logit_mse(
    student_BTD: Tensor,
    teacher_BTD: Tensor,
    head: Head,
    mask_BT: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Squared distance of logits, mean over tokens and vocabulary, for any head.

    Logits exist for `chunk_tokens` tokens at a time, forward and backward: each
    chunk is computed again in the backward pass instead of being kept.
    """
    student_ND, teacher_ND = student_BTD.flatten(0, -2), teacher_BTD.flatten(0, -2)
    chunks = zip(student_ND.split(chunk_tokens), teacher_ND.split(chunk_tokens), strict=True)
    per_token_N = torch.cat([checkpoint(_logit_squares, s, t, head, use_reentrant=False) for s, t in chunks])
    return _mean_over_tokens(per_token_N, None if mask_BT is None else mask_BT.flatten())


def _logit_squares(student_ND: Tensor, teacher_ND: Tensor, head: Head) -> Tensor:
    with torch.no_grad():
        teacher_NV = head(teacher_ND)
    return _squares(head(student_ND), teacher_NV).mean(-1)


def _squares(student: Tensor, teacher: Tensor) -> Tensor:
    # Only the difference is kept for the backward pass; the teacher's tensor is free to go.
    return (student.float() - teacher.float()).square()


def _mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1)
