"""Greedy decoding of responses to prompts, in batches, for the probes that read text."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.contracts import Progress, no_progress
from actors.models.decoding import end_tokens, plain_greedy
from actors.models.offloading.dispatch import input_device


@dataclass(frozen=True)
class Response:
    """The generated `tokens`, without the end token, and their text; `finished` if the model ended it."""

    tokens: tuple[int, ...]
    text: str
    finished: bool


@torch.inference_mode()
def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 8,
    progress: Progress = no_progress,
) -> list[Response]:
    """Generate the likeliest tokens after each prompt, up to `max_new_tokens`, in the order of the prompts.

    The model's own generation configuration gives the end tokens and nothing else: no penalty, no sampling.

    A tokenizer with a chat template is given the prompt as a user's turn, any
    other the prompt as it stands. Prompts of similar length share a batch; they are
    padded on the left and the padding is masked.
    """
    model.eval()
    padder = copy.copy(tokenizer)
    padder.padding_side = "left"
    padder.pad_token = padder.pad_token or padder.eos_token or padder.convert_ids_to_tokens(0)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    ends = end_tokens(model, tokenizer)
    settings = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": ends or None,
        "pad_token_id": padder.pad_token_id,
    }
    place = input_device(model)
    responses: dict[int, Response] = {}
    for start in range(0, len(order), batch_size):
        progress(start, len(order), "prompts")
        chosen = order[start : start + batch_size]
        batch = padder.pad({"input_ids": [encoded[i] for i in chosen]}, return_tensors="pt").to(place)
        with plain_greedy(model, **settings) as config:
            generated = model.generate(**batch, generation_config=config)
        for index, row in zip(chosen, generated[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            stop = next((position for position, token in enumerate(row) if token in ends), None)
            tokens = tuple(row[:stop])
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            responses[index] = Response(tokens, text, stop is not None)
    progress(len(order), len(order), "prompts")
    return [responses[index] for index in range(len(prompts))]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the prompt's tokens: as a user's turn, where the tokenizer has a chat template."""
    if not tokenizer.chat_template:
        return tokenizer(prompt).input_ids
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def last_logits_only(model: PreTrainedModel) -> dict[str, int]:
    """Return keywords with which `model` runs its head at the last position alone, where its family can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
