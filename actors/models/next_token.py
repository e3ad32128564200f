"""The loss of the next token through the head, with the logits of a few tokens at a time.

Shape letters: B rows, T tokens, K tokens of a chunk, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def next_token_nats(
    logits_of: Callable[[Tensor], Tensor], targets_BT: Tensor, tokens_at_once: int | None = None
) -> Tensor:
    """Return −log p of each target, in nats, from a log-softmax in float32: [B, T] on the targets' device.

    Gradients flow, and then autograd keeps the logits of every chunk: who needs them calls this for a
    chunk, inside what computes or frees a chunk's logits in the backward pass.

    Args:
        logits_of: from positions [K] to the logits there, [B, K, V], of any type and device.
        targets_BT: the token that each position predicts.
        tokens_at_once: K, the positions whose logits exist at one time; all if None.
    """
    num_tokens = targets_BT.shape[1]
    nats = [torch.zeros_like(targets_BT[:, :0], dtype=torch.float32)]
    for tokens_K in torch.arange(num_tokens, device=targets_BT.device).split(tokens_at_once or num_tokens):
        if len(tokens_K):
            logits_BKV = logits_of(tokens_K).float()
            target_BK = targets_BT[:, tokens_K].to(logits_BKV.device)
            nats_N = cross_entropy(logits_BKV.flatten(0, 1), target_BK.flatten(), reduction="none")
            nats.append(nats_N.view_as(target_BK).to(targets_BT.device))
    return torch.cat(nats, 1)
