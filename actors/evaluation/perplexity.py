"""Token perplexity of a long run of tokens.

Shape letters: B windows, T tokens of a window, N tokens of all, X hidden or vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedModel

from actors.contracts import Progress, no_progress
from actors.errors import RequestError
from actors.models.head import LogitHead
from actors.models.next_token import next_token_nats
from actors.models.offloading.dispatch import input_device

_CHUNK = 512
"""Positions whose logits exist at one time on the way through the head."""


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood of the predicted tokens, in nats, and how many they were."""

    loss_nats: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss_nats)


@torch.inference_mode()
def token_perplexity(
    model: PreTrainedModel,
    input_ids: LongTensor,
    context: int,
    batch_size: int = 8,
    progress: Progress = no_progress,
) -> Perplexity:
    """Return the perplexity of `input_ids` [T_total], in windows of `context` tokens that do not overlap.

    Each window predicts its tokens 2..T; the last one may be shorter and counts
    if it has at least two tokens. The log-softmax is taken in float32 and the
    sum in float64. `batch_size` windows run at a time; the result does not
    depend on it. The logits of a batch never exist whole, except in families whose head
    cannot be run by itself: there, those of one window do. Progress counts windows.

    Raises RequestError if there is no token to predict, or if `context` is
    more than the model has positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context < 2:
        raise RequestError(f"a perplexity context needs at least 2 tokens, not {context}")
    if positions is not None and context > positions:
        raise RequestError(
            f"a perplexity context of {context} tokens is more than the {positions} positions of the model"
        )
    if len(input_ids) < 2:
        raise RequestError(f"perplexity needs at least 2 tokens; the text has {len(input_ids)}")
    model.eval()
    windows = input_ids.to(input_device(model)).split(context)
    full = [w for w in windows if len(w) == context]
    batches = [torch.stack(full[i : i + batch_size]) for i in range(0, len(full), batch_size)]
    if 2 <= len(windows[-1]) < context:
        batches.append(windows[-1][None])
    head = LogitHead(model) if _head_stands_alone(model, batches[0]) else None
    num_windows, done, nats = sum(len(batch) for batch in batches), 0, 0.0
    for batch in batches:
        progress(done, num_windows, "windows")
        if head is not None:
            nats += _nats(head, model.base_model(batch, use_cache=False).last_hidden_state, batch)
        else:  # through the family's own forward pass, one window at a time
            logits = (model(ids[None], use_cache=False).logits for ids in batch)
            nats += sum(_nats(_as_it_is, each, ids[None]) for each, ids in zip(logits, batch, strict=True))
        done += len(batch)
    progress(done, num_windows, "windows")
    num_tokens = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    return Perplexity(nats / num_tokens, num_tokens)


def _head_stands_alone(model: PreTrainedModel, ids_BT: Tensor) -> bool:
    """Return true if the model's logits follow from its last hidden states alone.

    Found out on a few tokens rather than from a list of families.
    """
    if model.get_output_embeddings() is None or model.base_model is model:
        return False
    probe = ids_BT[:1, :8]
    hidden = model.base_model(probe, use_cache=False).last_hidden_state
    return torch.equal(LogitHead(model)(hidden), model(probe, use_cache=False).logits)


def _nats(head: Callable[[Tensor], Tensor], states_BTX: Tensor, ids_BT: Tensor) -> float:
    """Return the sum of -log p over the predicted tokens, through the head in chunks of positions."""
    states_1NX = states_BTX[:, :-1].flatten(0, 1)[None]
    targets_1N = ids_BT[:, 1:].flatten()[None]
    nats_1N = next_token_nats(lambda tokens_K: head(states_1NX[:, tokens_K]), targets_1N, _CHUNK)
    return nats_1N.double().sum().item()


def _as_it_is(logits: Tensor) -> Tensor:
    return logits
