"""The scores of sequences × candidates, what they prove, and which to compute next.

Shape letters: S sequences, N layers, C candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actors.contracts import ScoreKind, ScoreResult
from actors.scoring.criteria import TIE_TOLERANCE, removal_order
from actors.scoring.elimination import ROUNDS, contenders, leaders

if TYPE_CHECKING:
    from actors.scoring.score import Scorer, Shard, ShardScores

ROUNDING = 1e-6
"""What rounding may add to a score, in float32 and relative to scores above 1."""

SCREENING_FLOOR = 1e-3
"""Least error, relative to the score, that the screening dtype is taken to make."""


@dataclass(frozen=True)
class Cells:
    """What to compute next: candidates on sequences, which come `again` for other candidates."""

    positions: tuple[int, ...]
    candidates: tuple[int, ...]
    again: bool


class ScoreTable:
    """Scores of sequences × layers in one dtype, filled in as shards are done."""

    def __init__(self, scorer: "Scorer", screened: bool = False):
        self.scorer, self.screened = scorer, screened
        self.num_sequences = max(1, len(scorer.sequences))
        self.rows_SN = torch.zeros(self.num_sequences, scorer.num_layers, dtype=torch.float64)
        self.known_SN = torch.zeros_like(self.rows_SN, dtype=torch.bool)
        self._lengths = [len(sequence) for sequence in scorer.sequences]
        self._weights_S = torch.ones(1, dtype=torch.float64)
        if scorer.sequences:
            self._weights_S = scorer.criterion.weights(self._lengths)
        self._portion = -(-self.num_sequences // ROUNDS)
        self.layer_forwards = 0

    def add(self, shard: "Shard", scores: "ShardScores") -> None:
        """Enter the scores of a shard."""
        place = (torch.tensor(shard.positions)[:, None], torch.tensor(shard.candidates))
        self.rows_SN[place] = torch.tensor(scores.rows, dtype=torch.float64)
        self.known_SN[place] = True
        self.layer_forwards += scores.layer_forwards

    def progress(self, candidates: Sequence[int]) -> int:
        """Return the sequences that all of the candidates which may still win were scored on."""
        alive = self._contenders(candidates) if self.scorer.spec.eliminate else range(len(candidates))
        return int(self.known_SN[:, [candidates[c] for c in alive]].all(1).sum())

    def scores(self, layers: Sequence[int], seen_S: Tensor | None = None) -> Tensor:
        """Return the criterion's scores of `layers` over the sequences of `seen_S`, or over all. [C]"""
        seen_S = torch.ones(self.num_sequences, dtype=torch.bool) if seen_S is None else seen_S
        return self.scorer.criterion.combine(self.rows_SN[seen_S][:, list(layers)], self._weights_S[seen_S])

    def best(self, layers: Sequence[int]) -> Tensor:
        """Return scores with the best possible row for every sequence that is not known: bounds. [C]"""
        rows_SC, known_SC = self.rows_SN[:, list(layers)], self.known_SN[:, list(layers)]
        best = self.scorer.criterion.best
        filled_SC = torch.where(known_SC, rows_SC, torch.nan if best is None else best)
        return self.scorer.criterion.combine(filled_SC, self._weights_S)

    def finished(self, layers: Sequence[int]) -> Tensor:
        """Return which of `layers` were scored on every sequence. [C]"""
        return self.known_SN[:, list(layers)].all(0)

    def next_cells(self, candidates: Sequence[int], again: bool = False) -> Cells | None:
        """Return what to compute so that it is known which of `candidates` go first; None if it is known.

        Without `eliminate` that is all there is. With it, a portion of the sequences for all candidates;
        then all sequences for those that lead; then the next portion for those that may still win.
        """
        finished_C = self.finished(candidates)
        if not self.scorer.spec.eliminate:
            unfinished = [c for c, done in zip(candidates, finished_C, strict=True) if not done]
            return Cells(self._order(unfinished), tuple(unfinished), again) if unfinished else None
        num_winners, alive = self.scorer.spec.num_remove, self._contenders(candidates)
        open_ = [c for c in alive if not finished_C[c]]
        if not open_:
            return None
        seen_S = self.known_SN[:, [candidates[c] for c in alive]].all(1)
        if len(alive) > num_winners and seen_S.any():
            means_C = self.sign * self.scores(candidates, seen_S)
            ahead = [c for c in leaders(means_C, alive, num_winners) if not finished_C[c]]
            if ahead:
                layers = tuple(sorted(candidates[c] for c in ahead))
                return Cells(self._order(layers), layers, True)
        layers = tuple(candidates[c] for c in open_)
        portion = self._portion if len(alive) > num_winners else self.num_sequences
        return Cells(self._order(layers)[:portion], layers, again)

    @property
    def sign(self) -> int:
        """What scores are multiplied with so that the highest goes first."""
        return 1 if self.scorer.criterion.highest_first else -1

    def _contenders(self, candidates: Sequence[int]) -> list[int]:
        """Return which of `candidates`, by position, may still be among the first to go."""
        num_winners, finished_C = self.scorer.spec.num_remove, self.finished(candidates)
        best_C = self.sign * self.best(candidates)
        scores_C = best_C[finished_C]
        if len(scores_C) < num_winners:
            return list(range(len(candidates)))
        size = abs(scores_C.topk(num_winners).values[-1].item())
        exact = (TIE_TOLERANCE + ROUNDING) * max(1.0, size)
        slack = SCREENING_FLOOR * size if self.screened else exact
        return contenders(best_C, finished_C, num_winners, slack)

    def _order(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return the sequences that not all of `layers` were scored on, those first that cost least.

        The cost is a sequence's tokens by its weight. Of like sequences each portion has some from all over
        the text, as neighbours are alike.
        """
        cost = [
            length / weight if weight else float("inf")
            for length, weight in zip(self._lengths, self._weights_S.tolist(), strict=False)
        ] or [0.0]
        apart = -(-self.num_sequences // self._portion)
        unseen = torch.nonzero(~self.known_SN[:, list(layers)].all(1)).flatten().tolist()
        return tuple(sorted(unseen, key=lambda s: (cost[s], s % apart, s)))


def in_doubt(table: ScoreTable, screened: ScoreTable) -> list[int]:
    """Return the candidates that screening leaves in doubt: not confirmed, and near the last winner.

    Near is three times the largest error seen on the confirmed ones, and never less than
    `SCREENING_FLOOR` of the winner's score. A rule from measurements, not a proof.
    """
    candidates, num_winners, sign = table.scorer.removable, table.scorer.spec.num_remove, table.sign
    confirmed = [i for i in candidates if table.known_SN[:, i].any()]
    winners_C = sign * table.scores([i for i in confirmed if table.known_SN[:, i].all()])
    threshold = winners_C.topk(min(num_winners, len(winners_C))).values[-1].item()
    margin = SCREENING_FLOOR * abs(threshold)
    for layer in confirmed:
        both_S = table.known_SN[:, layer] & screened.known_SN[:, layer]
        exact, rough = (each.scores([layer], both_S).item() for each in (table, screened))
        margin = max(margin, 3 * abs(exact - rough))
    best_C = (sign * screened.best(candidates)).tolist()
    near = {i for i, best in zip(candidates, best_C, strict=True) if best >= threshold - margin}
    return sorted(near - set(confirmed))


def score_result(table: ScoreTable, screened: ScoreTable | None = None) -> ScoreResult:
    """Return what is known of every candidate; those whose score is exact come first in the order."""
    scorer = table.scorer
    scores: list[float] = []
    kinds: list[ScoreKind] = []
    for layer in scorer.candidates:
        known_S = table.known_SN[:, layer]
        of = table if screened is None or known_S.any() else screened
        finished = bool(of.known_SN[:, layer].all())
        scores.append((of.scores([layer]) if finished else of.best([layer])).item())
        if of is table:
            kinds.append("exact" if finished else "bound")
        else:
            kinds.append("screened" if finished else "screened_bound")
    run = scorer.spec.num_remove if scorer.criterion.chooses_run else 1
    protected = set(scorer.candidates) - set(scorer.removable)
    order = removal_order(scores, scorer.criterion.highest_first, run, protected)
    order.sort(key=lambda i: kinds[i] != "exact")
    tables = [table] if screened is None else [table, screened]
    return ScoreResult(
        source_layers=scorer.source_layers,
        scores=tuple(scores),
        removal_order=tuple(scorer.source_layers[i] for i in order),
        num_sequences=len(scorer.sequences),
        num_tokens=sum(len(sequence) for sequence in scorer.sequences),
        layer_forwards=sum(each.layer_forwards for each in tables),
        layer_forwards_saved=_saved(tables[-1]),
        kinds=tuple(kinds) if set(kinds) != {"exact"} else (),
    )


def _saved(table: ScoreTable) -> int:
    """Return the cost of the cells that were not computed: of each, the blocks after candidate i."""
    passed_N = torch.arange(table.scorer.num_layers - 1, -1, -1)
    return int((~table.known_SN * passed_N).sum())
