"""Arithmetic on three digits with one right token (*Limits of Layer Pruning*, §3.2 and App. A.4).

Shape letters: B problems, T tokens, V vocabulary.
"""

import operator
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.contracts import Progress, no_progress
from actors.errors import RequestError
from actors.evaluation.probes.decoding import last_logits_only
from actors.models.offloading.dispatch import input_device

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Problem:
    """A prompt and the right digit after it."""

    prompt: str
    answer: int


@dataclass(frozen=True)
class DigitPrediction:
    """The right digit's log-probability, in nats, and whether it was the likeliest of the ten digits.

    `log_probability` is taken over the ten digits, `log_probability_vocabulary`
    over all tokens.
    """

    log_probability: float
    log_probability_vocabulary: float
    right: bool


def all_problems() -> list[Problem]:
    """Return every problem `(a ∘ b) ∘ c` with a, b, c of 1..9, ∘ of + − ×, whose value is one digit.

    In a fixed order. These are 1,847 of the 6,561 from which GPT-3's `single_digit_three_ops` was
    drawn, worded as in EleutherAI/arithmetic. Values below 0 or above 9 are left
    out: no single digit is right.
    """
    digits = range(1, 10)
    problems = []
    for a, first, b, second, c in product(digits, OPERATIONS, digits, OPERATIONS, digits):
        value = OPERATIONS[second](OPERATIONS[first](a, b), c)
        if 0 <= value <= 9:
            problems.append(Problem(f"Question: What is ({a} {first} {b}) {second} {c}?\nAnswer:", value))
    return problems


def draw_problems(count: int, seed: int = 0) -> list[Problem]:
    """Draw `count` of `all_problems`, or all if there are no more, without repetition."""
    problems = all_problems()
    return random.Random(seed).sample(problems, min(count, len(problems)))


@torch.inference_mode()
def answer_problems(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    batch_size: int = 8,
    progress: Progress = no_progress,
) -> list[DigitPrediction]:
    """Return the model's prediction of the right digit after each prompt, in the order of the problems.

    Problems of equal length share a batch, so nothing is padded.

    Raises RequestError if the tokenizer has no token for each digit.
    """
    model.eval()
    by_length: dict[int, list[int]] = defaultdict(list)
    encoded = [_encode(tokenizer, problem.prompt) for problem in problems]
    for index, (context, _) in enumerate(encoded):
        by_length[len(context)].append(index)
    last_only = last_logits_only(model)
    predictions: dict[int, DigitPrediction] = {}
    for alike in by_length.values():
        for start in range(0, len(alike), batch_size):
            progress(len(predictions), len(problems), "problems")
            chosen = alike[start : start + batch_size]
            ids_BT = torch.tensor([encoded[i][0] for i in chosen], device=input_device(model))
            logits_BV = model(ids_BT, use_cache=False, **last_only).logits[:, -1].float()
            for index, logits_V in zip(chosen, logits_BV, strict=True):
                tokens, right = encoded[index][1], problems[index].answer
                digits = logits_V[tokens]
                predictions[index] = DigitPrediction(
                    log_probability=digits.log_softmax(-1)[right].item(),
                    log_probability_vocabulary=logits_V.log_softmax(-1)[tokens[right]].item(),
                    right=digits.argmax().item() == right,
                )
    progress(len(problems), len(problems), "problems")
    return [predictions[index] for index in range(len(problems))]


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[list[int], list[int]]:
    """Return the context that all ten digits share, and the token of each digit after it.

    Found by encoding the prompt with each digit: some tokenizers have tokens
    ` 7`, others put the space into the context.
    """
    whole = [tokenizer(f"{prompt} {digit}").input_ids for digit in DIGITS]
    lengths = {len(ids) for ids in whole}
    at = next((i for i, tokens in enumerate(zip(*whole, strict=False)) if len(set(tokens)) > 1), None)
    if at is None or len(lengths) > 1 or len({ids[at] for ids in whole}) < len(DIGITS):
        raise RequestError(
            "the probe 'arithmetic' needs a tokenizer with a token of its own for each digit; this one "
            f"encodes {prompt + ' 0'!r} to {prompt + ' 9'!r} otherwise; leave the probe out"
        )
    return whole[0][:at], [ids[at] for ids in whole]
