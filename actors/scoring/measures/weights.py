"""Measures of the weights of a block alone.

Weights are the matrices (attention and MLP projections, experts); norms and biases
are left out.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.models import find_layers, resident
from actors.scoring.measures.calibration import Calibration


def magnitude_l1(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Return the sum of the absolute values of the weight matrices. [1, N]"""
    return weight_norms(model, 1)[None]


def magnitude_l2(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Return the sum of the Frobenius norms of the weight matrices. [1, N]"""
    return weight_norms(model, 2)[None]


def matrices(block: nn.Module) -> list[nn.Parameter]:
    """Return the weight matrices of the block."""
    return [parameter for parameter in block.parameters() if parameter.dim() >= 2]


@torch.no_grad()
def weight_norms(model: PreTrainedModel, order: int) -> Tensor:
    """Return Σ_k ‖W_k‖_p over the matrices of each block, entrywise norms of order p. [N]"""
    norms = []
    for index, block in enumerate(find_layers(model).modules):
        with resident(model, index):
            norms.append(
                sum(
                    torch.linalg.vector_norm(weight, ord=order, dtype=torch.float32).item()
                    for weight in matrices(block)
                )
            )
    return torch.tensor(norms, dtype=torch.float64)
