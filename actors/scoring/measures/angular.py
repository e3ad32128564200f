"""Angular distance between the points of the residual stream (Gromov et al., arXiv 2403.17887, §3.2).

Point ℓ of the stream is what block ℓ receives: point 0 is the embedding output and
point N what the last block hands to the final norm. Blocks ℓ..ℓ+n-1 lie between
the points ℓ and ℓ+n, so that a run of n blocks may begin at any ℓ in 0..N-n.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from actors.models import depth
from actors.scoring.measures.calibration import Calibration

FARTHEST = 1.0
"""The largest angular distance there is, given to starts after which no n blocks are left."""


def angular_distances(model: PreTrainedModel, sequences: Sequence[Tensor]) -> Tensor:
    """Return Eq. 7 between all points of the stream: the mean of arccos(cos) / π at the last token.

    Args:
        model: a decoder language model of N blocks.
        sequences: token ids [T] without padding, so that the last token is a real one.

    Returns:
        [N+1, N+1], symmetric, in 0..1; entry [ℓ, ℓ+n] belongs to the run of n blocks from ℓ on.
    """
    return torch.stack(_distances(model, Calibration(sequences))).mean(0)


def angular_block(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Return the angular distance at the last token between the inputs of the blocks i and i + n. [S, N]

    n is `calibration.num_remove`. Starts later than N - n get `FARTHEST`.

    Raises:
        RequestError: no run of so many blocks.
    """
    num_starts = calibration.num_runs(model)
    rows = torch.full((len(calibration.sequences), depth(model.config)), FARTHEST, dtype=torch.float64)
    for row, distances in zip(rows, _distances(model, calibration), strict=True):
        row[:num_starts] = distances.diagonal(calibration.num_remove)
    return rows


@torch.no_grad()
def _distances(model: PreTrainedModel, calibration: Calibration) -> list[Tensor]:
    """Return Eq. 7 for each sequence. [N+1, N+1]"""
    points: list[list[Tensor]] = [[] for _ in calibration.sequences]  # the last token at each, [D]
    for passed in calibration.passed_blocks(model):
        states = [passed.leaving_GTD] if passed.index else [passed.entering_GTD, passed.leaving_GTD]
        # A copy: what a part is kept of stays in memory as a whole.
        for last_GD in (hidden_GTD[:, -1].cpu().clone() for hidden_GTD in states):
            for position, last_D in zip(passed.positions, last_GD, strict=True):
                points[position].append(last_D)
    distances = []
    for of_sequence in points:
        # In float64, as arccos near 1 turns an error of 1e-7 in the cosine into one of 1e-4.
        directions = normalize(torch.stack(of_sequence).double(), dim=-1)
        distances.append(torch.arccos((directions @ directions.T).clamp(-1, 1)) / math.pi)
    return distances
