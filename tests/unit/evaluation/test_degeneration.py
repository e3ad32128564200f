"""Repetition by a plain count, Self-BLEU against NLTK."""

import random

import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from actors.evaluation.probes.degeneration import repetition, self_bleu


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c d", 0.0),
        ("a b c", 0.0),
        ("", 0.0),
        ("a a a a a a a a", 0.8),  # five 4-grams, one of them distinct
        ("a b c d a b c d", 0.2),  # abcd bcda cdab dabc abcd
    ],
)
def test_repetition_is_the_share_of_4_grams_seen_before(text: str, expected: float) -> None:
    assert repetition(text.split()) == pytest.approx(expected)


def _texts(seed: int, count: int, words: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(words) for _ in range(generator.randrange(1, 25))] for _ in range(count)]


@pytest.mark.parametrize("seed", range(6))
def test_self_bleu_is_nltks(seed: int) -> None:
    texts = _texts(seed, count=7, words=(2, 4, 30)[seed % 3])
    smoothing = SmoothingFunction().method1
    expected = [
        sentence_bleu(texts[:i] + texts[i + 1 :], text, smoothing_function=smoothing)
        for i, text in enumerate(texts)
    ]
    assert self_bleu(texts) == pytest.approx(sum(expected) / len(texts), rel=1e-12)


def test_self_bleu_of_equal_and_of_foreign_texts() -> None:
    text = list("abcdefgh")
    assert self_bleu([text, text, text]) == pytest.approx(1)
    assert self_bleu([list("abcd"), list("efgh")]) == 0
    assert self_bleu([text]) == 0
    assert self_bleu([text, []]) == 0
