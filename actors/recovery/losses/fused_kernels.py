"""Divergences of logits by liger-kernel's fused kernel (arXiv 2410.10989), on GPUs where it is installed.

`logit_losses.chunked_logit_loss` gives the same numbers everywhere.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from actors.recovery.losses.lm_head import LMHead
from actors.recovery.losses.token_weights import ALL_TOKENS, TokenWeights

BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
"""Losses that the kernel has, by its β: β KL(p_T ‖ m) + (1 − β) KL(p_S ‖ m), m = β p_T + (1 − β) p_S; its
limits at 0 and 1 are the KLs themselves."""

IGNORED = -100


@cache
def fused_linear_jsd() -> Callable[..., Tensor] | None:
    """Return liger-kernel's function, or None where it is not installed or there is no GPU."""
    if not torch.cuda.is_available():
        return None
    try:
        from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction
    except ImportError:
        return None
    return LigerFusedLinearJSDFunction.apply


def fused_heads(name: str, student: LMHead, teacher: LMHead) -> tuple[Tensor, Tensor] | None:
    """Return the matrices W [V, D] of both heads if the kernel has this loss of them, else None."""
    if name not in BETAS or fused_linear_jsd() is None:
        return None
    ours, theirs = student.matrix(), teacher.matrix()
    return None if ours is None or theirs is None else (ours, theirs)


def fused_logit_loss(
    name: str,
    student_BTD: Tensor,
    teacher_BTD: Tensor,
    heads: tuple[Tensor, Tensor],
    temperature: float = 1.0,
    weights: TokenWeights = ALL_TOKENS,
) -> Tensor:
    """Return a row of `BETAS` between the logits of student and teacher; values as `logit_losses` has them.

    Args:
        student_BTD, teacher_BTD: after the final norm; D may differ.
        heads: what `fused_heads` returned.
    """
    kernel: Any = fused_linear_jsd()
    student_ND, teacher_ND = weights.rows(student_BTD), weights.rows(teacher_BTD.detach())
    ours_VD, theirs_VD = heads
    # The kernel divides by the number of rows.
    mean = kernel(student_ND, ours_VD, teacher_ND, theirs_VD, None, BETAS[name], IGNORED, temperature)
    return weights.divided(temperature**2 * len(student_ND) * mean, student_BTD[..., 0].numel())
