"""How many texts are generated at a time: as many as memory allows of the longest."""

from collections.abc import Iterable
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedModel

from actors.evaluation.probes.decoding import last_logits_only
from actors.models.offloading.dispatch import input_device

CPU_BATCH = 8
"""Texts at a time on a device that is not searched: a CPU does not say in time that memory is short."""

LARGEST_BATCH = 64
"""Texts at a time to begin with; halved until memory suffices."""

SEARCHED = ("cuda",)


def longest_text(
    requests: Iterable[tuple[int, dict[str, Any]]], default_new_tokens: int, max_length: int
) -> int:
    """Return the tokens that the longest text may have, its prompt counted, as HFLM cuts prompts.

    Args:
        requests: of each, the tokens of its prompt and lm-eval's generation settings.
        default_new_tokens: tokens to generate where the settings do not say.
        max_length: longest text in tokens.
    """
    longest = 1
    for prompt_tokens, settings in requests:
        known = normalize_gen_kwargs(settings, default_new_tokens)
        new_tokens = known["max_gen_toks"]
        own = min(prompt_tokens, max_length - new_tokens) + new_tokens
        longest = max(longest, known.get("max_length", own))
    return longest


def generation_batch(model: PreTrainedModel, length: int) -> int:
    """Return how many texts of `length` tokens, prompt and all, the model's device has memory for.

    A pass over whole texts is run, with padding, the cache and the last logits: what it takes bounds
    what their generation takes, for the prompt's pass is shorter and the cache ends no larger.
    """
    if input_device(model).type not in SEARCHED:
        return CPU_BATCH
    rows = LARGEST_BATCH
    while rows > 1 and not _fits(model, rows, length):
        rows //= 2
    return rows


@torch.inference_mode()
def _fits(model: PreTrainedModel, rows: int, length: int) -> bool:
    ids_BT = torch.ones(rows, length, dtype=torch.long, device=input_device(model))
    padded_BT = torch.ones_like(ids_BT)
    padded_BT[1:, 0] = 0  # without padding, some kernels need no mask
    try:
        model(ids_BT, attention_mask=padded_BT, use_cache=True, **last_logits_only(model))
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    torch.cuda.empty_cache()
    return fits
