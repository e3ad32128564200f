"""Distances between the logits of student and teacher: one row a variant, and their sums over tokens.

Each function takes logits of student and teacher [N, V] in fp32 and the
temperature τ, and gives a value per token [N]. The divergences are those of
p = softmax(z / τ), times τ²: gradients shrink by τ², and the factor keeps the
weight of the term the same for every τ (Hinton et al., arXiv 1503.02531, §2).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, logaddexp

from actors.errors import RequestError, unknown_name
from actors.recovery.losses.chunked_sum import Head, sum_over_chunks
from actors.recovery.losses.token_weights import ALL_TOKENS, TokenWeights

LogitLoss = Callable[[Tensor, Tensor], Tensor]
"""(student_NV, teacher_NV) → values of the tokens [N]."""


@dataclass(frozen=True)
class LogitVariant:
    """`loss`: (student_NV, teacher_NV, temperature) → [N]."""

    loss: Callable[[Tensor, Tensor, float], Tensor]
    paper: str


def mse(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """Return the mean over V of the squared difference; the temperature has no effect."""
    return (student_NV - teacher_NV).square().mean(-1)


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """Return τ² KL(p_T ‖ p_S), a sum over V."""
    student, teacher = _log_probabilities(student_NV, teacher_NV, temperature)
    return temperature**2 * _kl(teacher, student)


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """Return τ² KL(p_S ‖ p_T), a sum over V."""
    student, teacher = _log_probabilities(student_NV, teacher_NV, temperature)
    return temperature**2 * _kl(student, teacher)


def jsd(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """Return τ² [KL(p_T ‖ m) + KL(p_S ‖ m)] / 2 with m = (p_T + p_S) / 2, a sum over V."""
    student, teacher = _log_probabilities(student_NV, teacher_NV, temperature)
    # m is where the sum is least, so no gradient goes through it; taking none also rounds less.
    middle = logaddexp(student.detach(), teacher) - math.log(2)
    return temperature**2 * (_kl(teacher, middle) + _kl(student, middle)) / 2


def cross_entropy(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """Return −τ² Σ_V p_T log p_S: the forward KL and the teacher's own entropy."""
    student, teacher = _log_probabilities(student_NV, teacher_NV, temperature)
    return -(temperature**2) * (teacher.exp() * student).sum(-1)


LOGIT_LOSSES: dict[str, LogitVariant] = {
    "mse": LogitVariant(mse, "IteRABRe §3.2"),
    "forward_kl": LogitVariant(forward_kl, "Minitron (arXiv 2407.14679) §2.3"),
    "reverse_kl": LogitVariant(reverse_kl, "MiniLLM (arXiv 2306.08543) §2.1"),
    "jsd": LogitVariant(jsd, "GKD (arXiv 2306.13649) §2, with β = 1/2"),
    "cross_entropy": LogitVariant(cross_entropy, "Hinton et al. (arXiv 1503.02531) §2"),
}


def find_logit_loss(name: str, temperature: float) -> LogitLoss:
    """Return the loss of that name at that temperature.

    Raises:
        RequestError: there is none, or the temperature is not above 0.
    """
    if name not in LOGIT_LOSSES:
        raise unknown_name("logit loss", name, LOGIT_LOSSES)
    if not 0 < temperature < math.inf:
        raise RequestError(f"recovery.loss.temperature must be above 0, not {temperature}")
    loss = LOGIT_LOSSES[name].loss
    return lambda student_NV, teacher_NV: loss(student_NV, teacher_NV, temperature)


GRAM_ROWS = 8192
"""Rows of a head on the CPU that are on the device at a time."""


def gram_matrix(head_VD: Tensor, device: torch.device | None = None) -> Tensor:
    """Return G = WᵀW / V [D, D] in fp32, all of the LM head that a logit MSE depends on.

    Args:
        device: computes, and holds the result; the head's own if not given. A head that is elsewhere goes
            there in parts.
    """
    vocabulary = head_VD.shape[0]
    if device is None or device == head_VD.device:
        weight_VD = head_VD.detach().float()
        return weight_VD.T @ weight_VD / vocabulary
    gram_DD = torch.zeros(head_VD.shape[1], head_VD.shape[1], device=device)
    for rows_RD in head_VD.detach().split(GRAM_ROWS):
        part_RD = rows_RD.to(device).float()
        gram_DD.addmm_(part_RD.T, part_RD)
    return gram_DD / vocabulary


def logit_mse_from_hidden(
    student_BTD: Tensor, teacher_BTD: Tensor, gram_DD: Tensor, weights: TokenWeights = ALL_TOKENS
) -> Tensor:
    """Return the squared distance of logits z = Wh without forming them; a token's value is the mean over V.

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
    return weights.mean(squares_BT)


def chunked_logit_loss(
    student_BTD: Tensor,
    teacher_BTD: Tensor,
    heads: tuple[Head, Head],
    distance: LogitLoss,
    weights: TokenWeights = ALL_TOKENS,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return any row of `LOGIT_LOSSES` between the logits of student and teacher, for any head.

    Logits exist for a chunk of tokens at a time, and only for tokens that count.

    Args:
        student_BTD, teacher_BTD: after the final norm; D may differ.
        heads: the student's and the teacher's.
        distance: (student_NV, teacher_NV) → values of the tokens [N].
    """
    student_head, teacher_head = heads
    teacher_ND = weights.rows(teacher_BTD.detach())

    def chunk_sum(student_ND: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            teacher_NV = teacher_head(teacher_ND[rows]).float()
        return distance(student_head(student_ND).float(), teacher_NV).sum()

    total = sum_over_chunks(weights.rows(student_BTD), chunk_sum, student_head, chunk_tokens)
    return weights.divided(total, student_BTD[..., 0].numel())


def _log_probabilities(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return (student_NV / temperature).log_softmax(-1), (teacher_NV / temperature).log_softmax(-1)


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """Return KL(p ‖ q) of log-probabilities, a sum over V."""
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1)
