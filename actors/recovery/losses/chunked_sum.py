"""Losses of logits without the logits: a chunk of tokens at a time, forward and backward.

N tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 128

ChunkSum = Callable[[Tensor, slice], Tensor]
"""(hidden states of some tokens [n, D], which rows of all they are) → the sum of their values."""


class Head(Protocol):
    """From final hidden states to logits."""

    frozen: bool

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits [.., V] of hidden states after the final norm [.., D]."""


def sum_over_chunks(
    hidden_ND: Tensor, chunk_sum: ChunkSum, head: Head, chunk_tokens: int | None = None
) -> Tensor:
    """Sum `chunk_sum` over all rows, with gradients; what it forms is kept for one chunk only.

    With a frozen head, a chunk's gradient is taken at once, while its logits are
    there. A trained head needs its own gradient too, scaled by a factor
    that autograd has only later, so each chunk is computed again in the backward pass.
    """
    size = chunk_tokens or CHUNK_TOKENS
    if head.frozen:
        return _FrozenHeadSum.apply(hidden_ND, chunk_sum, size)
    total = hidden_ND[:0].float().sum()
    for rows in _chunks(len(hidden_ND), size):
        total = total + checkpoint(chunk_sum, hidden_ND[rows], rows, use_reentrant=False)
    return total


def _chunks(num_rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


class _FrozenHeadSum(torch.autograd.Function):
    """The sum, whose gradient to the hidden states [N, D] is all that is kept of the logits."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden_ND: Tensor, chunk_sum: ChunkSum, size: int) -> Tensor:
        total = torch.zeros((), device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(hidden_ND), size):
            chunk = hidden_ND[rows].detach()
            if gradient_ND is None:
                total += chunk_sum(chunk, rows)
                continue
            with torch.enable_grad():
                value = chunk_sum(chunk.requires_grad_(), rows)
            (gradient_ND[rows],) = torch.autograd.grad(value, chunk)
            total += value.detach()
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * above.to(gradient_ND.dtype), None, None
