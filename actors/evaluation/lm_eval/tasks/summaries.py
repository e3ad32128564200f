"""Agreement of a summary with its reference."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

MEASURES = ("rouge1", "rouge2", "rougeL")


def rouge(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return F1 of ROUGE-1, -2 and -L with stemming (Lin, 2004), 0 to 1, of a generated summary."""
    scores = _scorer().score(doc["summary"], results[0].strip())
    return {measure: scores[measure].fmeasure for measure in MEASURES}


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(list(MEASURES), use_stemmer=True)
