"""Likelihood of the calibration text under each candidate, through the LM head in chunks of tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from actors.models import text_config
from actors.scoring.measures.wavefront import FinalStates

LOGITS_BYTES = 256 * 2**20
"""Memory for logits where no budget says less."""

BYTES_PER_LOGIT = 16
"""A logit, its float32 copy, and what log-softmax makes of it."""


def negative_log_likelihoods(
    states: FinalStates, sequences: Sequence[Tensor], memory_budget: int | None = None
) -> Tensor:
    """Return each row's mean −log p of the tokens 2..T, in nats: [streams, positions]; 0 where T is 1."""
    ids_GT = torch.stack([sequences[i] for i in states.positions])
    targets_BT = ids_GT.repeat(len(states.streams), 1).to(states.hidden_BTD.device)
    num_rows, num_tokens = targets_BT.shape
    logits_budget = min(LOGITS_BYTES, memory_budget // 4) if memory_budget else LOGITS_BYTES
    vocabulary = text_config(states.layerwise.config).vocab_size
    at_once = max(1, logits_budget // (num_rows * vocabulary * BYTES_PER_LOGIT))
    nats_B = torch.zeros(num_rows, dtype=torch.float64, device=targets_BT.device)
    for tokens_K in torch.arange(num_tokens - 1, device=targets_BT.device).split(at_once):
        logits_BKV = states.layerwise.logits(states.hidden_BTD, tokens_K).to(targets_BT.device).float()
        nats = cross_entropy(
            logits_BKV.flatten(0, 1), targets_BT[:, tokens_K + 1].flatten(), reduction="none"
        )
        nats_B += nats.view(num_rows, -1).double().sum(1)
    return (nats_B / max(1, num_tokens - 1)).view(len(states.streams), len(states.positions))
