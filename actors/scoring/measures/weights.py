"""Measures of the weights of a block, alone or with their gradients.

Weights are the matrices (attention and MLP projections, experts); norms and biases
are left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.models import LayerwisePass, find_layers
from actors.models.offloading.dispatch import loaded_weights
from actors.scoring.measures.calibration import Calibration


def magnitude_l1(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Return the sum of the absolute values of the weight matrices. [1, N]"""
    return weight_norms(model, 1)[None]


def magnitude_l2(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Return the sum of the Frobenius norms of the weight matrices. [1, N]"""
    return weight_norms(model, 2)[None]


def taylor(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Return the first-order change of the mean loss with the weight matrices zero, by weight. [S, N]"""
    changes = first_order_taylor(model, calibration.sequences)
    return changes.expand(len(calibration.sequences), -1)


def matrices(block: nn.Module) -> list[nn.Parameter]:
    """Return the weight matrices of the block."""
    return [parameter for parameter in block.parameters() if parameter.dim() >= 2]


@torch.no_grad()
def weight_norms(model: PreTrainedModel, order: int) -> Tensor:
    """Return Σ_k ‖W_k‖_p over the matrices of each block, entrywise norms of order p. [N]"""
    norms = []
    for block in find_layers(model).modules:
        with loaded_weights(block):
            norms.append(
                sum(
                    torch.linalg.vector_norm(weight, ord=order, dtype=torch.float32).item()
                    for weight in matrices(block)
                )
            )
    return torch.tensor(norms, dtype=torch.float64)


def first_order_taylor(model: PreTrainedModel, sequences: Sequence[Tensor]) -> Tensor:
    """Return Σ_k Σ_ij |W_k,ij · ∂L/∂W_k,ij| of each block, L the mean loss of the sequences in nats. [N]

    Backpropagation goes block by block: forward once without a graph, keeping what
    each block receives; then each block, from the last to the first, is run again
    with a graph of its own. Only one block's gradients are ever held.

    Args:
        model: a decoder language model of N blocks, in eval mode.
        sequences: token ids [T]; one of a single token has no next token and is left out.

    Raises:
        RequestError: every sequence is a single token.
    """
    passes = [LayerwisePass(model, sequence[None]) for sequence in sequences if len(sequence) > 1]
    if not passes:
        raise RequestError("every calibration sequence is a single token, which has no next-token loss")
    blocks = find_layers(model).modules
    received: list[list[Tensor]] = []  # by sequence, the input of each block and the output of the last
    with torch.no_grad():
        for layerwise in passes:
            points = [layerwise.hidden_BTD.detach()]
            for index in range(len(blocks)):
                points.append(layerwise.block(index, points[-1]))
            received.append(points)
    targets = [sequence for sequence in sequences if len(sequence) > 1]
    upstream = [
        _loss_gradient(layerwise, points.pop(), target) / len(passes)
        for layerwise, points, target in zip(passes, received, targets, strict=True)
    ]
    scores = torch.zeros(len(blocks), dtype=torch.float64)
    for index in reversed(range(len(blocks))):
        with loaded_weights(blocks[index]):
            weights = matrices(blocks[index])
            gradients = [torch.zeros_like(weight) for weight in weights]
            for i, layerwise in enumerate(passes):
                hidden = received[i].pop()
                upstream[i], *found = _backward(layerwise, index, hidden, upstream[i], weights)
                for total, gradient in zip(gradients, found, strict=True):
                    total += gradient
            with torch.no_grad():
                scores[index] = sum(
                    (weight.float() * gradient.float()).abs().sum(dtype=torch.float64).item()
                    for weight, gradient in zip(weights, gradients, strict=True)
                )
    return scores


@torch.enable_grad()
def _loss_gradient(layerwise: LayerwisePass, output_BTD: Tensor, target_T: Tensor) -> Tensor:
    """Return the gradient of the mean next-token loss by the output of the last block. [1, T, D]"""
    leaf = output_BTD.requires_grad_()
    predicting = torch.arange(len(target_T) - 1, device=target_T.device)
    loss = cross_entropy(layerwise.logits(leaf, predicting)[0].float(), target_T[1:])
    return torch.autograd.grad(loss, leaf)[0]


@torch.enable_grad()
def _backward(
    layerwise: LayerwisePass,
    index: int,
    hidden_BTD: Tensor,
    upstream_BTD: Tensor,
    weights: Sequence[nn.Parameter],
) -> tuple[Tensor, ...]:
    """Return the gradients by the block's input and by `weights`; zero for an expert that saw no token."""
    leaf = hidden_BTD.detach().requires_grad_()
    # Weights of a model with folded adapters come frozen.
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        output = layerwise.block(index, leaf)
        return torch.autograd.grad(output, [leaf, *weights], upstream_BTD, materialize_grads=True)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
