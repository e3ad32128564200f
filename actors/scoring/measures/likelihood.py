"""What each candidate predicts, through the LM head in chunks of tokens: against the text, and a reference.

Shape letters: C candidates, G sequences of one length, B rows, T tokens, K tokens of a chunk, D hidden,
V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from actors.models import text_config
from actors.models.head import LogitHead
from actors.models.next_token import next_token_nats
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
    at_once = tokens_at_once(num_rows, text_config(states.layerwise.config).vocab_size, memory_budget)
    nats_BT = next_token_nats(
        lambda tokens_K: states.layerwise.logits(states.hidden_BTD, tokens_K), targets_BT[:, 1:], at_once
    )
    nats_B = nats_BT.double().sum(1) / max(1, num_tokens - 1)
    return nats_B.view(len(states.streams), len(states.positions))


def divergences(
    reference_GTD: Tensor,
    hidden_CGTD: Tensor,
    heads: tuple[LogitHead, LogitHead],
    vocabulary: int,
    memory_budget: int | None = None,
) -> Tensor:
    """Return the mean over tokens of KL(p_ref ‖ p), in nats: [C, G], float64.

    Args:
        reference_GTD: the reference's states after the final norm.
        hidden_CGTD: the candidates' likewise.
        heads: the reference's and the candidates'.
        vocabulary: V, the same for both.
        memory_budget: bytes; a quarter of it, at most, is for logits.
    """
    reference_head, head = heads
    num_candidates, num_sequences, num_tokens, _ = hidden_CGTD.shape
    at_once = tokens_at_once((1 + num_candidates) * num_sequences, vocabulary, memory_budget)
    nats_CG = torch.zeros(num_candidates, num_sequences, dtype=torch.float64, device=hidden_CGTD.device)
    for start in range(0, num_tokens, at_once):
        tokens = slice(start, start + at_once)
        reference_GKV = reference_head(reference_GTD[:, tokens]).float().log_softmax(-1)
        logits_BKV = head(hidden_CGTD[:, :, tokens].flatten(0, 1)).to(reference_GKV.device).float()
        candidates_CGKV = logits_BKV.log_softmax(-1).unflatten(0, (num_candidates, num_sequences))
        # A sum of small differences: not the cross-entropy less the entropy, which would round by their size.
        nats_CGK = (reference_GKV.exp() * (reference_GKV - candidates_CGKV)).sum(-1)
        nats_CG += nats_CGK.double().sum(-1).to(nats_CG.device)
    return nats_CG / num_tokens


def tokens_at_once(num_rows: int, vocabulary: int, memory_budget: int | None) -> int:
    """Return how many tokens of so many rows may have their logits at one time."""
    budget = min(LOGITS_BYTES, memory_budget // 4) if memory_budget else LOGITS_BYTES
    return max(1, budget // (num_rows * vocabulary * BYTES_PER_LOGIT))
