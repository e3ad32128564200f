"""Speculative decoding: a pruned model drafts tokens, and the unpruned one verifies several in one pass.

By transformers' assisted generation (Leviathan et al. 2023, arXiv 2211.17192, in its greedy form: a drafted
token is accepted if it is the verifier's own likeliest), so the text is that of plain greedy decoding.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.contracts import Progress, no_progress
from actors.errors import RequestError
from actors.evaluation.probes.decoding import encode_prompt
from actors.models import without_layers
from actors.models.decoding import end_tokens, plain_greedy
from actors.models.offloading.dispatch import input_device


@dataclass(frozen=True)
class Speculation:
    """What one prompt came to.

    `tokens` new ones took `forwards` of the verifier, which looked at `drafted` tokens of the draft and took
    `accepted` of them. `same_text` if plain greedy decoding gave the same tokens.
    """

    tokens: int
    forwards: int
    drafted: int
    accepted: int
    seconds: float
    plain_tokens: int
    plain_seconds: float
    same_text: bool


@torch.inference_mode()
def speculate(
    verifier: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    num_assistant_tokens: int,
    progress: Progress = no_progress,
) -> list[Speculation]:
    """Answer each prompt by plain greedy decoding and by assisted generation, the two taking turns.

    The draft is asked for `num_assistant_tokens` at a time, whatever it thinks of them. The first prompt is
    answered once more before, so that nothing is timed cold.

    Raises:
        RequestError: models whose state cannot be taken back by a token, as assisted generation needs it.
    """
    for model in (verifier, draft):
        if model.eval()._is_stateful:
            raise RequestError(
                f"probe speculative: the state of a {model.config.model_type} model cannot be taken back by "
                "a token, which transformers' assisted generation needs; leave the probe out"
            )
    if draft is verifier:  # their forwards are told apart by the object
        draft = without_layers(verifier, ())
    place = input_device(verifier)
    ends = end_tokens(verifier, tokenizer)
    settings = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": ends or None,
        "pad_token_id": tokenizer.pad_token_id or next(iter(ends), 0),
    }
    drafting = {
        "num_assistant_tokens": num_assistant_tokens,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    found: list[Speculation] = []
    with plain_greedy(verifier, **settings) as config, plain_greedy(draft, **drafting):

        def answer(ids_1T: LongTensor, **more: Any) -> tuple[list[int], float]:
            generated, seconds = _timed(lambda: verifier.generate(ids_1T, generation_config=config, **more))
            return generated[0, ids_1T.shape[1] :].tolist(), seconds

        for number, prompt in enumerate([*prompts[:1], *prompts]):
            progress(max(0, number - 1), len(prompts), "prompts")
            ids_1T = torch.tensor([encode_prompt(tokenizer, prompt)], device=place)
            plain, plain_seconds = answer(ids_1T)
            with _verified(verifier, ids_1T.shape[1]) as rounds:
                tokens, seconds = answer(ids_1T, assistant_model=draft)
            if number:
                drafted, accepted = sum(map(len, rounds)), num_accepted(tokens, rounds)
                counts = (len(tokens), len(rounds), drafted, accepted)
                found.append(Speculation(*counts, seconds, len(plain), plain_seconds, tokens == plain))
    progress(len(prompts), len(prompts), "prompts")
    return found


def num_accepted(tokens: Sequence[int], rounds: Sequence[Sequence[int]]) -> int:
    """Return how many drafted tokens are in the text.

    Each round's drafted tokens are taken up to the first that differs, and the verifier adds one of its own.

    Args:
        tokens: the text.
        rounds: the drafted tokens that each forward of the verifier looked at.
    """
    accepted = at = 0
    for drafted in rounds:
        same = [a == b for a, b in zip(drafted, tokens[at:], strict=False)]
        matches = same.index(False) if False in same else len(same)
        accepted += matches
        at += matches + 1
    return accepted


@contextmanager
def _verified(verifier: PreTrainedModel, prompt_length: int) -> Iterator[list[list[int]]]:
    """Give the drafted tokens of each forward of the verifier: what it reads after its own last token."""
    rounds: list[list[int]] = []

    def note(_model: PreTrainedModel, _args: Any, named: dict[str, Any]) -> None:
        rounds.append(named["input_ids"][0, 1 if rounds else prompt_length :].tolist())

    hook = verifier.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rounds
    finally:
        hook.remove()


def _timed(work: Callable[[], LongTensor]) -> tuple[LongTensor, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started
