"""Distances between the logits of student and teacher: one row a variant, and their sums over tokens.

Each function takes logits of student and teacher [N, V] in fp32 and the
temperature τ, and gives a value per token [N]. The divergences are those of
p = softmax(z / τ), times τ²: gradients shrink by τ², and the factor keeps the
weight of the term the same for every τ (Hinton et al., arXiv 1503.02531, §2).

Of a teacher that gives its K most likely tokens only, the distributions compared have K + 1 outcomes: those
tokens, and any other. Their divergence is at most that over the vocabulary, and equal to it at K = V.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, logaddexp, nn

from actors.data import TopK
from actors.errors import RequestError, unknown_name
from actors.recovery.losses.chunked_sum import Head, sum_over_chunks
from actors.recovery.losses.token_weights import ALL_TOKENS, TokenWeights

NO_TARGET = -100
"""In place of a next token where none is to be predicted: what torch's cross-entropy leaves out."""

SMALLEST_REST = 1e-7
"""The least probability of all tokens beside the K most likely: rounding of a sum near 1 in fp32."""

LARGEST_LOG_RATIO = 80.0
"""Beyond it, e^x is not finite in fp32, and p itself rounds to 0."""

LogitLoss = Callable[[Tensor, Tensor], Tensor]
"""(student_NV, teacher_NV) → values of the tokens [N]."""


@dataclass(frozen=True)
class LogitVariant:
    """`loss`: (student_NV, teacher_NV, temperature) → [N].

    `skewed` if it takes the share `skew`, too. `compares_probabilities` unless it needs the logits.
    """

    loss: Callable[..., Tensor]
    paper: str
    skewed: bool = False
    compares_probabilities: bool = True


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


def skew_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float, skew: float) -> Tensor:
    """Return τ² KL(p_T ‖ α p_S + (1 − α) p_T) of logits, α being `skew`, a sum over V."""
    student, teacher = _log_probabilities(student_NV, teacher_NV, temperature)
    return temperature**2 * _skewed_kl(teacher, student, skew)


def skew_reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float, skew: float) -> Tensor:
    """Return τ² KL(p_S ‖ α p_T + (1 − α) p_S) of logits, α being `skew`, a sum over V."""
    student, teacher = _log_probabilities(student_NV, teacher_NV, temperature)
    return temperature**2 * _skewed_kl(student, teacher, skew)


def cross_entropy(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """Return −τ² Σ_V p_T log p_S: the forward KL and the teacher's own entropy."""
    student, teacher = _log_probabilities(student_NV, teacher_NV, temperature)
    return -(temperature**2) * (teacher.exp() * student).sum(-1)


LOGIT_LOSSES: dict[str, LogitVariant] = {
    "mse": LogitVariant(mse, "IteRABRe §3.2", compares_probabilities=False),
    "forward_kl": LogitVariant(forward_kl, "Minitron (arXiv 2407.14679) §2.3"),
    "reverse_kl": LogitVariant(reverse_kl, "MiniLLM (arXiv 2306.08543) §2.1"),
    "jsd": LogitVariant(jsd, "GKD (arXiv 2306.13649) §2, with β = 1/2"),
    "skew_kl": LogitVariant(skew_kl, "DistiLLM (arXiv 2402.03898) Eq. 3", skewed=True),
    "skew_reverse_kl": LogitVariant(skew_reverse_kl, "DistiLLM (arXiv 2402.03898) §3.1", skewed=True),
    "cross_entropy": LogitVariant(cross_entropy, "Hinton et al. (arXiv 1503.02531) §2"),
}


def find_logit_loss(name: str, temperature: float, skew: float = 0.1) -> LogitLoss:
    """Return the loss of that name at that temperature.

    Raises:
        RequestError: there is none, or the temperature is not above 0.
    """
    if name not in LOGIT_LOSSES:
        raise unknown_name("logit loss", name, LOGIT_LOSSES)
    if not 0 < temperature < math.inf:
        raise RequestError(f"recovery.loss.temperature must be above 0, not {temperature}")
    variant = LOGIT_LOSSES[name]
    more = (skew,) if variant.skewed else ()
    return lambda student_NV, teacher_NV: variant.loss(student_NV, teacher_NV, temperature, *more)


def check_topk(name: str, temperature: float) -> None:
    """Check that the loss can be computed from a teacher's K most likely tokens.

    Raises:
        RequestError: it compares logits, or another temperature than that of the stored probabilities.
    """
    if not LOGIT_LOSSES[name].compares_probabilities:
        raise RequestError(
            f"recovery.loss.logit_loss {name!r} compares logits, of which a top-k cache holds none; "
            "use forward_kl, or recovery.teacher_cache: hidden"
        )
    if temperature != 1:
        raise RequestError(
            f"recovery.loss.temperature is {temperature}, but a top-k cache holds probabilities at 1; set it "
            "to that, or use recovery.teacher_cache: hidden"
        )


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
    teacher: Tensor | TopK,
    heads: tuple[Head, Head],
    distance: LogitLoss,
    weights: TokenWeights = ALL_TOKENS,
    next_token: tuple[float, Tensor] | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return any row of `LOGIT_LOSSES` between the logits of student and teacher, for any head.

    Logits exist for a chunk of tokens at a time, and only for tokens that count.

    Args:
        student_BTD: after the final norm.
        teacher: its state after the final norm, whose D may differ, or its most likely tokens.
        heads: the student's and the teacher's.
        distance: (student_NV, teacher_NV) → values of the tokens [N].
        next_token: how much the next token's cross-entropy counts beside the distance, and the
            token that follows each [B, T], `NO_TARGET` where none does.

    Returns:
        Distance + factor × cross-entropy, with gradients, and the two of them [2], without; or the distance
        and itself [1].
    """
    student_head, teacher_head = heads
    factor, next_ids_BT = next_token or (0.0, None)
    targets_N = None if next_ids_BT is None else weights.rows(next_ids_BT[..., None])[:, 0]
    rows_of = [weights.rows(tensor) for tensor in _teacher_tensors(teacher)]

    def chunk_sum(student_ND: Tensor, rows: slice) -> Tensor:
        student_NV = student_head(student_ND).float()
        chunk = [tensor[rows] for tensor in rows_of]
        if isinstance(teacher, TopK):
            values_N = distance(*_outcomes(student_NV, *chunk))
        else:
            with torch.no_grad():
                teacher_NV = teacher_head(chunk[0]).float()
            values_N = distance(student_NV, teacher_NV)
        sums = [values_N.sum()]
        if targets_N is not None:
            sums.append(
                nn.functional.cross_entropy(
                    student_NV, targets_N[rows], reduction="sum", ignore_index=NO_TARGET
                )
            )
        return torch.stack(sums)

    factors = (1.0,) if targets_N is None else (1.0, factor)
    total, sums_K = sum_over_chunks(weights.rows(student_BTD), chunk_sum, student_head, chunk_tokens, factors)
    num_tokens = student_BTD[..., 0].numel()
    return weights.divided(total, num_tokens), weights.divided(sums_K, num_tokens)


def _teacher_tensors(teacher: Tensor | TopK) -> list[Tensor]:
    if isinstance(teacher, TopK):
        return [teacher.ids_BTK, teacher.log_probabilities_BTK]
    return [teacher.detach()]


def _outcomes(student_NV: Tensor, ids_NK: Tensor, teacher_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of student and teacher [N, K + 1]: of those tokens, and of any other.

    Args:
        student_NV: its logits.
        teacher_NK: the teacher's log-probabilities of the tokens `ids_NK`.
    """
    chosen_NK = student_NV.log_softmax(-1).gather(-1, ids_NK.long())
    return _with_rest(chosen_NK), _with_rest(teacher_NK.float())


def _with_rest(log_NK: Tensor) -> Tensor:
    """Append log(1 − Σ p), which rounding must not make infinite."""
    rest_N1 = (1 - log_NK.exp().sum(-1, keepdim=True)).clamp(min=SMALLEST_REST).log()
    return torch.cat([log_NK, rest_N1], dim=-1)


def _log_probabilities(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if temperature != 1:  # A division by 1 is a pass over N·V numbers all the same, forward and backward.
        student_NV, teacher_NV = student_NV / temperature, teacher_NV / temperature
    return student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """Return KL(p ‖ q) of log-probabilities, a sum over V."""
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1)


def _skewed_kl(p_NV: Tensor, q_NV: Tensor, skew: float) -> Tensor:
    """Return KL(p ‖ α q + (1 − α) p) = −Σ p log(1 + α (q / p − 1)) of log-probabilities, a sum over V.

    Through the ratio, since the logarithms of p and of the mixture, which is nearly p, would cancel.
    """
    ratio_NV = (q_NV - p_NV).clamp(max=LARGEST_LOG_RATIO)
    return -(p_NV.exp() * (skew * ratio_NV.expm1()).log1p()).sum(-1)
