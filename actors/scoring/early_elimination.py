"""Elimination of candidates that cannot win any more, before all calibration text is read.

The elimination of Maron & Moore (Hoeffding Races, NIPS 1993), with bounds on paired
differences (Student's t) in place of Hoeffding's, which do not use the
scores' spread.
"""

from collections.abc import Sequence
from statistics import NormalDist

from torch import Tensor

ROUND_SEQUENCES = 16
"""Sequences scored between two eliminations."""


def surviving_candidates(rows_SC: Tensor, num_winners: int, confidence: float, looks: int) -> list[int]:
    """Return the candidates that may still be among the best `num_winners`: columns of `rows_SC`.

    A candidate is eliminated when it is worse, sequence by sequence, than the last
    of the present winners. Over all candidates and looks, the chance that a
    true winner is eliminated is at most 1 − `confidence` (Bonferroni), as far as
    means over the sequences seen are normal.

    Args:
        rows_SC: one score for each sequence seen and candidate; the higher, the sooner removed.
        looks: how often candidates are looked at in all rounds.
    """
    num_sequences, num_candidates = rows_SC.shape
    rows = rows_SC.double()
    order: list[int] = rows.mean(0).argsort(descending=True).tolist()
    winners = order[:num_winners]
    level = 1 - (1 - confidence) / (num_candidates * looks)
    margin = student_t(level, num_sequences - 1) / num_sequences**0.5
    lead = rows[:, winners[-1:]] - rows
    beaten = lead.mean(0) > margin * lead.std(0)
    return sorted({*winners, *(c for c in range(num_candidates) if not beaten[c])})


def student_t(level: float, freedom: int) -> float:
    """Return the quantile of Student's t for `freedom` ≥ 3 degrees (Abramowitz & Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(level)
    terms: Sequence[float] = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
