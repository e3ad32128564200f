"""Which candidates may still be the next to go, by bounds on what they were not scored on.

A score is a mean over sequences, or grows with one, and no sequence can say better of
a candidate than some value: 1 for a cosine, 0 for a loss or a divergence. With that
value for every sequence that it was not scored on, a candidate's score is at its
best. Where this is worse than the scores of as many others as will go, the candidate
cannot be among them, whatever the sequences say: it is given up, and its bound is
its score. The choice is that of scoring all candidates on all sequences, ties included.

Scores here are such that the higher goes first. Shape letters: C candidates.
"""

import torch
from torch import Tensor

ROUNDS = 10
"""Portions of the sequences after which bounds are looked at again.

Not a matter of how many actors there are or where the weights are: the bounds are results, too.
"""


def contenders(best_C: Tensor, finished_C: Tensor, num_winners: int, slack: float) -> list[int]:
    """Return the candidates that may be among the `num_winners` first to go.

    Of those first, each is within a tie of the `num_winners`-th best score: when it is taken, one of so
    many best is left. A candidate is given up when its bound is below that score by more than `slack`.

    Args:
        slack: the tolerance of ties and what rounding may add to a score.
    """
    scores = best_C[finished_C]
    if len(scores) < num_winners:
        return list(range(len(best_C)))
    threshold = scores.topk(num_winners).values[-1]
    return torch.nonzero(best_C >= threshold - slack).flatten().tolist()


def leaders(means_C: Tensor, alive: list[int], num_winners: int) -> list[int]:
    """Return the `num_winners` contenders of the best means so far, which are finished first."""
    order: list[int] = means_C[alive].argsort(descending=True, stable=True).tolist()
    return [alive[c] for c in order[:num_winners]]
