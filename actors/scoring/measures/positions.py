"""Measures that read neither weights nor text: by depth, and at random."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.models import depth
from actors.scoring.measures.calibration import Calibration


def deepest(model: PreTrainedModel, _calibration: Calibration) -> Tensor:
    """Return the depth, with the last block kept to the end. [1, N]"""
    scores = torch.arange(depth(model.config), dtype=torch.float32)
    scores[-1] = -1
    return scores[None]


def reverse(model: PreTrainedModel, _calibration: Calibration) -> Tensor:
    """Return the depth: from the tail. [1, N]"""
    return torch.arange(depth(model.config), dtype=torch.float32)[None]


def random(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Return uniform draws by seed. [1, N]"""
    generator = torch.Generator().manual_seed(calibration.seed)
    return torch.rand(1, depth(model.config), generator=generator)
