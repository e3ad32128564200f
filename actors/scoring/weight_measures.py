"""What the weights of a block or sub-block say of its importance, alone or with their gradients.

Weights are the matrices (attention and MLP projections, experts); norms and biases
are left out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.models import BLOCK, LayerwisePass, find_layers, sub_block_weights
from actors.models.offloading.dispatch import loaded_weights


def matrices(block: nn.Module, granularity: str = BLOCK) -> list[nn.Parameter]:
    """The weight matrices of the block, or of its attention or MLP."""
    weights = block.parameters() if granularity == BLOCK else sub_block_weights(block, granularity).values()
    return [parameter for parameter in weights if parameter.dim() >= 2]


@torch.no_grad()
def weight_norms(model: PreTrainedModel, order: int, granularity: str = BLOCK) -> Tensor:
    """Σ_k ‖W_k‖_p over the matrices of each block, entrywise norms of order p. [N]"""
    norms = []
    for block in find_layers(model).modules:
        with loaded_weights(block):
            norms.append(sum(_norm(weight, order) for weight in matrices(block, granularity)))
    return torch.tensor(norms, dtype=torch.float64)


def _norm(weight: Tensor, order: int) -> float:
    return torch.linalg.vector_norm(weight, ord=order, dtype=torch.float32).item()


def first_order_taylor(
    model: PreTrainedModel, sequences: Sequence[Tensor], granularity: str = BLOCK
) -> Tensor:
    """Σ_k Σ_ij |W_k,ij · ∂L/∂W_k,ij| of each block, L the mean loss of the sequences in nats. [N]

    Backpropagation goes block by block: forward once without a graph, keeping what
    each block receives; then each block, from the last to the first, is run again
    with a graph of its own. Only one block's gradients are ever held.

    Args:
        model: a decoder language model of N blocks, in eval mode.
        sequences: token ids [T]; one of a single token has no next token and is left out.

    Raises:
        RequestError: every sequence is a single token.
    """
    walks = [LayerwisePass(model, sequence[None]) for sequence in sequences if len(sequence) > 1]
    if not walks:
        raise RequestError("every calibration sequence is a single token, which has no next-token loss")
    blocks = find_layers(model).modules
    received = [_inputs(walk, len(blocks)) for walk in walks]
    targets = [sequence for sequence in sequences if len(sequence) > 1]
    upstream = [
        _loss_gradient(walk, points.pop(), target) / len(walks)
        for walk, points, target in zip(walks, received, targets, strict=True)
    ]
    scores = torch.zeros(len(blocks), dtype=torch.float64)
    for index in reversed(range(len(blocks))):
        with loaded_weights(blocks[index]):
            weights = matrices(blocks[index], granularity)
            gradients = [torch.zeros_like(weight) for weight in weights]
            for i, walk in enumerate(walks):
                hidden = received[i].pop()
                upstream[i], *found = _backward(walk, index, hidden, upstream[i], weights)
                for total, gradient in zip(gradients, found, strict=True):
                    total += gradient
            scores[index] = sum(map(_first_order_change, weights, gradients))
    return scores


@torch.no_grad()
def _inputs(walk: LayerwisePass, num_layers: int) -> list[Tensor]:
    """What each block receives, and the output of the last: N+1 tensors [1, T, D]."""
    points = [walk.hidden_BTD.detach()]
    for index in range(num_layers):
        points.append(walk.block(index, points[-1]))
    return points


@torch.enable_grad()
def _loss_gradient(walk: LayerwisePass, output_BTD: Tensor, target_T: Tensor) -> Tensor:
    """Gradient of the mean next-token loss by the output of the last block. [1, T, D]"""
    leaf = output_BTD.requires_grad_()
    predicting = torch.arange(len(target_T) - 1, device=target_T.device)
    loss = cross_entropy(walk.logits(leaf, predicting)[0].float(), target_T[1:])
    return torch.autograd.grad(loss, leaf)[0]


@torch.enable_grad()
def _backward(
    walk: LayerwisePass, index: int, hidden_BTD: Tensor, upstream_BTD: Tensor, weights: Sequence[nn.Parameter]
) -> tuple[Tensor, ...]:
    """Gradients by the block's input and by `weights`; zero for an expert that saw no token."""
    leaf = hidden_BTD.detach().requires_grad_()
    with _differentiable(weights):
        output = walk.block(index, leaf)
        return torch.autograd.grad(output, [leaf, *weights], upstream_BTD, materialize_grads=True)


@contextmanager
def _differentiable(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Weights of a model with folded adapters come frozen."""
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


@torch.no_grad()
def _first_order_change(weight: Tensor, gradient: Tensor) -> float:
    return (weight.float() * gradient.float()).abs().sum(dtype=torch.float64).item()
