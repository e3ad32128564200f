"""Next-token prediction: cross-entropy without the whole logits.

B sequences, T tokens, D hidden, V vocabulary, N any number of tokens.
"""

from torch import Tensor

from actors.models.next_token import next_token_nats
from actors.recovery.losses.chunked_sum import Head, sum_over_chunks
from actors.recovery.losses.token_weights import ALL_TOKENS, TokenWeights


def next_token_cross_entropy(
    hidden_BTD: Tensor,
    next_ids_BT: Tensor,
    head: Head,
    weights: TokenWeights = ALL_TOKENS,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the cross-entropy of the next token, in nats; a token's value is that of the token after it.

    Args:
        hidden_BTD: after the final norm.
        next_ids_BT: the id that follows each token; anything where none counts.
    """
    targets_N = weights.rows(next_ids_BT[..., None])[:, 0]

    def chunk_sum(hidden_ND: Tensor, rows: slice) -> Tensor:
        return next_token_nats(lambda tokens_N: head(hidden_ND)[None], targets_N[None, rows]).sum(1)

    total, _ = sum_over_chunks(weights.rows(hidden_BTD), chunk_sum, head, chunk_tokens)
    return weights.divided(total, next_ids_BT.numel())
