"""Repetition within a model's texts and among them (*Limits of Layer Pruning*, §3.1 and App. A.2).

Tokens are the model's own. Texts shorter than an n-gram have none of it.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

Tokens = Sequence[Hashable]

ORDER = 4
EPSILON = 0.1
"""Count given to an order of n-grams without any match (Chen and Cherry 2014, smoothing 1)."""


def repetition(tokens: Tokens, order: int = ORDER) -> float:
    """Return 1 − distinct n-grams / n-grams, the share of repeated ones; 0 if the text has none."""
    grams = _ngrams(tokens, order)
    return 1 - len(grams) / grams.total() if grams else 0.0


def self_bleu(texts: Sequence[Tokens], order: int = ORDER) -> float:
    """Return the mean over texts of BLEU with all other texts as references (Zhu et al. 2018), 0 to 1.

    Needs two texts; 0 for fewer.
    """
    if len(texts) < 2:
        return 0.0
    counts = [[_ngrams(text, n) for n in range(1, order + 1)] for text in texts]
    lengths = [len(text) for text in texts]
    scores = [
        _bleu(counts[i], lengths[i], counts[:i] + counts[i + 1 :], lengths[:i] + lengths[i + 1 :])
        for i in range(len(texts))
    ]
    return sum(scores) / len(scores)


def _bleu(
    counts: list[Counter[Tokens]], length: int, references: list[list[Counter[Tokens]]], lengths: list[int]
) -> float:
    """Return sentence BLEU (Papineni et al. 2002) of one text from its n-gram counts, by order."""
    matches = [
        sum(min(count, max(reference[n][gram] for reference in references)) for gram, count in grams.items())
        for n, grams in enumerate(counts)
    ]
    if matches[0] == 0:
        return 0.0
    precisions = [
        (match or EPSILON) / max(grams.total(), 1) for match, grams in zip(matches, counts, strict=True)
    ]
    closest = min(lengths, key=lambda other: (abs(other - length), other))
    brevity = 1.0 if length > closest else math.exp(1 - closest / length)
    return brevity * math.exp(sum(map(math.log, precisions)) / len(precisions))


def _ngrams(tokens: Tokens, order: int) -> Counter[Tokens]:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))
