"""Losses of logits without the logits: a chunk of tokens at a time, forward and backward.

N tokens, D hidden, V vocabulary, K terms.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 128

ChunkSum = Callable[[Tensor, slice], Tensor]
"""(hidden states of some tokens [n, D], which rows of all they are) → the sum of their values a term [K]."""


class Head(Protocol):
    """From final hidden states to logits."""

    frozen: bool

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits [.., V] of hidden states after the final norm [.., D]."""


def sum_over_chunks(
    hidden_ND: Tensor,
    chunk_sum: ChunkSum,
    head: Head,
    chunk_tokens: int | None = None,
    factors: Sequence[float] = (1.0,),
) -> tuple[Tensor, Tensor]:
    """Sum `chunk_sum` over all rows, with gradients; what it forms is kept for one chunk only.

    With a frozen head, a chunk's gradient is taken at once, while its logits are
    there. A trained head needs its own gradient too, scaled by a factor
    that autograd has only later, so each chunk is computed again in the backward pass.

    Args:
        factors: what each term counts in the total; one backward pass through the head serves all terms.

    Returns:
        The total, with gradients, and the sums of the terms [K], without.
    """
    size = chunk_tokens or CHUNK_TOKENS
    factors_K = torch.tensor(factors, device=hidden_ND.device)
    if head.frozen:
        return _FrozenHeadSum.apply(hidden_ND, chunk_sum, size, factors_K)
    total, sums_K = hidden_ND[:0].float().sum(), torch.zeros_like(factors_K)
    for rows in _chunks(len(hidden_ND), size):
        values_K = checkpoint(chunk_sum, hidden_ND[rows], rows, use_reentrant=False)
        total, sums_K = total + factors_K @ values_K, sums_K + values_K.detach()
    return total, sums_K


def _chunks(num_rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


class _FrozenHeadSum(torch.autograd.Function):
    """The total, whose gradient to the hidden states [N, D] is all that is kept of the logits."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_ND: Tensor, chunk_sum: ChunkSum, size: int, factors_K: Tensor
    ) -> tuple[Tensor, Tensor]:
        sums_K = torch.zeros_like(factors_K)
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(hidden_ND), size):
            chunk = hidden_ND[rows].detach()
            if gradient_ND is None:
                sums_K += chunk_sum(chunk, rows)
                continue
            with torch.enable_grad():
                values_K = chunk_sum(chunk.requires_grad_(), rows)
            (gradient_ND[rows],) = torch.autograd.grad(values_K, chunk, factors_K)
            sums_K += values_K.detach()
        ctx.save_for_backward(gradient_ND)
        ctx.mark_non_differentiable(sums_K)
        return factors_K @ sums_K, sums_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor, _sums: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * above.to(gradient_ND.dtype), None, None, None
