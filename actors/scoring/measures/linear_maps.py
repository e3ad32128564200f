"""How well one matrix stands for a run of blocks: the residual of the best linear map across it.

Point ℓ of the stream is what block ℓ receives, as in `angular`. A run of n blocks from i on is
replaced by x ↦ x (1 + A), with A from a ridge regression over tokens of norm one at the end,

    min_A  Σ_t ‖x_i,t A − (x_i+n,t − x_i,t)‖² / ‖x_i+n,t‖²  +  α ‖A‖²

so that every token counts alike: a few have norms a hundred times those of the rest. A map of D² numbers
fits a few thousand tokens whatever the run does, so it is judged on tokens that it was not fitted to: the
sequences of even positions are one half, the others the other, and each is judged by the map of the other.

T tokens, D hidden, S sequences, N blocks.
"""

from collections import deque

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.models import depth, text_config
from actors.models.offloading.dispatch import input_device
from actors.scoring.measures.calibration import Calibration
from actors.scoring.measures.memory_budget import costs_of

RIDGE = 0.1
"""α over the mean of the Gram matrix's diagonal. On SmolLM2 (D = 576) and 1,024 tokens the residual out of
sample is least here, mostly less than half of what it is at 1e-4; on 3,072 tokens this matters little."""

NOTHING_LEFT = 1.0
"""The residual of the map to zero: the least that starts get after which no n blocks are left."""


class _Half:
    """Sums over the tokens of half of the sequences, of the regression across one run."""

    def __init__(self, size: int, where: torch.device):
        self._gram_DD = torch.zeros(size, size, dtype=torch.float64, device=where)
        self._moment_DD = torch.zeros_like(self._gram_DD)
        self._squares = torch.zeros((), dtype=torch.float64, device=where)

    def add(self, entering_TD: Tensor, leaving_TD: Tensor) -> None:
        """Add tokens, by what enters the run and what leaves it."""
        entering_TD, leaving_TD = (x.to(self._gram_DD) for x in (entering_TD, leaving_TD))
        norm_T1 = leaving_TD.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        rows_TD, wanted_TD = entering_TD / norm_T1, (leaving_TD - entering_TD) / norm_T1
        self._gram_DD += rows_TD.T @ rows_TD
        self._moment_DD += rows_TD.T @ wanted_TD
        self._squares += wanted_TD.square().sum()

    def solve(self) -> Tensor:
        """Return A. [D, D]"""
        alpha = (RIDGE * self._gram_DD.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny)
        one_DD = torch.eye(len(self._gram_DD), dtype=torch.float64, device=alpha.device)
        return torch.linalg.solve(self._gram_DD + alpha * one_DD, self._moment_DD)

    def residual(self, map_DD: Tensor) -> Tensor:
        """Return Σ_t ‖x_t A − y_t‖² = Σ_t ‖y_t‖² − 2 tr(Aᵀ XᵀY) + tr(Aᵀ XᵀX A)."""
        return self._squares + (map_DD * (self._gram_DD @ map_DD - 2 * self._moment_DD)).sum()


@torch.no_grad()
def bridge_residual(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Return the residual of the best linear map across the run of n blocks from i on. [S, N]

    n is `calibration.num_remove`. All rows are alike: the map is that of all sequences. Starts later
    than N - n get the worst score of the others, and no less than `NOTHING_LEFT`. Half of the budget is
    for what passes the model, of which the last n points are kept. There is one pass if the sums of all
    runs, 32·D² bytes each, fit into the other half, else one for each portion of the runs.

    Raises:
        RequestError: no run of so many blocks, fewer than two sequences, or a budget too small for one.
    """
    sequences, num_starts = calibration.sequences, calibration.num_runs(model)
    if len(sequences) < 2:
        raise RequestError(
            "criterion 'bridge_residual' judges a map on other sequences than it was fitted to and got "
            f"{len(sequences)}: give scoring.calibration two or more, or raise scoring.max_sequences"
        )
    where, size = input_device(model), text_config(model.config).hidden_size
    lengths, run = [len(sequence) for sequence in sequences], calibration.num_remove
    budget = calibration.budget(model)
    for_states = min(budget, max(budget // 2, costs_of(model).of_streams(run).least(max(lengths))))
    at_once = max(1, (budget - for_states) // (32 * size**2))
    row_N = torch.full((depth(model.config),), NOTHING_LEFT, dtype=torch.float64)
    for first in range(0, num_starts, at_once):
        starts = range(first, min(first + at_once, num_starts))
        halves = {start: (_Half(size, where), _Half(size, where)) for start in starts}
        last = starts.stop - 2 + run
        received: dict[tuple[int, ...], deque[Tensor]] = {}  # by the last n blocks, by sequences
        for passed in calibration.passed_blocks(model, budget=for_states, streams=run, num_blocks=last + 1):
            points = received.setdefault(passed.positions, deque(maxlen=run))
            points.append(passed.entering_GTD)
            for remainder, half in enumerate(halves.get(passed.index + 1 - run, ())):
                rows = [g for g, position in enumerate(passed.positions) if position % 2 == remainder]
                half.add(points[0][rows].flatten(0, 1), passed.leaving_GTD[rows].flatten(0, 1))
            if passed.index == last:
                del received[passed.positions]
        for start, (even, odd) in halves.items():
            row_N[start] = (even.residual(odd.solve()) + odd.residual(even.solve())).item() / sum(lengths)
    row_N[num_starts:] = row_N.max().clamp(min=NOTHING_LEFT)
    return row_N.expand(len(sequences), -1)
