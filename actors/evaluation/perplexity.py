"""Token perplexity of a long run of tokens.

Shape letters: B windows, T tokens of a window, D hidden, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.models.offloading.dispatch import input_device

_CHUNK = 512
"""Positions whose logits exist at one time on the way through the plain head."""


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
    model: PreTrainedModel, input_ids: LongTensor, context: int, batch_size: int = 8
) -> Perplexity:
    """Return the perplexity of `input_ids` [T_total], in windows of `context` tokens that do not overlap.

    Each window predicts its tokens 2..T; the last one may be shorter and counts
    if it has at least two tokens. The log-softmax is taken in float32 and the
    sum in float64. `batch_size` windows run at a time; the result does not
    depend on it. The logits of a batch never exist whole, except in families
    that transform them (soft-capping, scaling): there, those of one window do.

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
    plain = _has_plain_head(model, batches[0])
    nats = 0.0
    for batch in batches:
        if plain:
            nats += _plain_nats(model, batch)
        else:  # through the family's own forward pass, one window at a time
            nats += sum(_nats(model(ids[None], use_cache=False).logits[0, :-1], ids[1:]) for ids in batch)
    num_tokens = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    return Perplexity(nats / num_tokens, num_tokens)


def _has_plain_head(model: PreTrainedModel, ids_BT: Tensor) -> bool:
    """Return true if the model's logits are its head applied to its last hidden state, and nothing more.

    Found out on a few tokens rather than from a list of families.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    probe = ids_BT[:1, :8]
    hidden = model.base_model(probe, use_cache=False).last_hidden_state
    return head.weight.shape[-1] == hidden.shape[-1] and torch.equal(
        head(hidden), model(probe, use_cache=False).logits
    )


def _plain_nats(model: PreTrainedModel, ids_BT: Tensor) -> float:
    """Return the sum of -log p over the predicted tokens, through the head in chunks of positions."""
    hidden_BTD = model.base_model(ids_BT, use_cache=False).last_hidden_state
    hidden, targets = hidden_BTD[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
    head = model.get_output_embeddings()
    chunks = zip(hidden.split(_CHUNK), targets.split(_CHUNK), strict=True)
    return sum(_nats(head(h), t) for h, t in chunks)


def _nats(logits: Tensor, targets: Tensor) -> float:
    return F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none").double().sum().item()
