"""Log-likelihoods of continuations, with nothing computed twice and no logit that is not used.

Sequences that begin alike are packed into prefix trees where the family can run
on them, which is tried out on a few tokens rather than read from
a list; else they run side by side, padded. The head runs at scored positions
alone, once for all sequences that meet there.

Shape letters: B rows, Q tokens of a row, D hidden, V vocabulary, P scored
positions, S scored tokens (several may be scored at one position).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from actors.contracts import Progress, no_progress
from actors.errors import MemoryExhaustedError
from actors.evaluation.lm_eval.family_support import family_support
from actors.evaluation.lm_eval.prefix_tree import PrefixTree, build_trees, run_rows
from actors.models import text_config
from actors.models.head import LogitHead
from actors.models.offloading.dispatch import input_device

LOGITS_AT_A_TIME = 2**26
"""Entries of the largest P x V block of logits that exists at one time."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
"""Tokens of a batch to begin with when its size is to be found; halved whenever memory does not suffice."""


@dataclass(frozen=True)
class Scored:
    """`targets` are the tokens after the last `len(targets)` tokens of `tokens`, the model's input."""

    tokens: list[int]
    targets: list[int]


class LikelihoodModel:
    """A causal language model that gives log-likelihoods of tokens.

    Args:
        model: on its device; put in eval mode.
        batch_tokens: tokens of a batch, padding counted; found by itself if None.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int | None = None):
        self._model = model.eval()
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(input_device(model).type, BATCH_TOKENS["cuda"])
        self._body: Callable[..., Tensor]
        self._head: Callable[[Tensor], Tensor]
        support = family_support(model)
        if support.head_stands_alone:
            self._body = lambda ids_BQ, **kwargs: (
                model.base_model(ids_BQ, use_cache=False, **kwargs).last_hidden_state
            )
            self._head = LogitHead(model)
        else:
            self._body = lambda ids_BQ, **kwargs: model(ids_BQ, use_cache=False, **kwargs).logits
            self._head = lambda logits: logits
        self.most_nodes = support.most_nodes

    def loglikelihoods(
        self, requests: Sequence[Scored], progress: Progress = no_progress
    ) -> list[tuple[float, bool]]:
        """Return, for each request, the log-probability of its targets; true if each is the likeliest token.

        Both as HFLM gives them with `softmax_dtype=float32`: a log-softmax in bfloat16 would round what is
        left of a sum of many tokens to steps of 0.5 nats and more.

        Raises MemoryExhaustedError if memory does not suffice for a single row.
        """
        found: dict[int, tuple[float, bool]] = {}
        trees = build_trees([request.tokens for request in requests], self.most_nodes)
        chains = sorted((tree for tree in trees if tree.is_chain), key=len, reverse=True)
        branched = sorted((tree for tree in trees if not tree.is_chain), key=len, reverse=True)
        for rows in chain(self._batches(chains), self._batches(branched)):
            members = [member for tree in rows for member in tree.members]
            scored = self._fitting(rows, [requests[member] for member in members])
            found |= zip(members, scored, strict=True)
            progress(len(found), len(requests), "log-likelihoods")
        return [found[i] for i in range(len(requests))]

    def _batches(self, trees: list[PrefixTree]) -> Iterator[list[PrefixTree]]:
        """Yield rows of falling size; `batch_tokens` may have shrunk when the next are taken."""
        first = 0
        while first < len(trees):
            last = first + max(1, self.batch_tokens // len(trees[first]))
            yield trees[first:last]
            first = last

    def _fitting(self, rows: list[PrefixTree], requests: list[Scored]) -> list[tuple[float, bool]]:
        """Score the rows, in halves if they do not fit into memory together."""
        try:
            return self._score(rows, requests)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise MemoryExhaustedError(
                    f"evaluation has no memory for one row of {len(rows[0])} tokens; set "
                    "evaluation.max_length lower, or give evaluation a larger GPU"
                ) from error
        torch.cuda.empty_cache()
        half = len(rows) // 2
        self.batch_tokens = half * len(rows[0])
        split = sum(len(tree.members) for tree in rows[:half])
        return [*self._fitting(rows[:half], requests[:split]), *self._fitting(rows[half:], requests[split:])]

    @torch.inference_mode()
    def _score(self, rows: list[PrefixTree], requests: list[Scored]) -> list[tuple[float, bool]]:
        hidden_BQD = run_rows(self._body, rows, input_device(self._model), self._model.dtype)
        device = hidden_BQD.device
        width, places, targets = hidden_BQD.shape[1], [], []
        paths = [(row, path) for row, tree in enumerate(rows) for path in tree.paths]
        for (row, path), request in zip(paths, requests, strict=True):
            places += [row * width + node for node in path[-len(request.targets) :]]
            targets += request.targets
        positions_P, position_S = torch.tensor(places, device=device).unique(return_inverse=True)
        hidden_PD = hidden_BQD.flatten(0, 1)[positions_P]
        logprob_S, greedy_S = self._target_logprobs(
            hidden_PD, position_S, torch.tensor(targets, device=device)
        )
        lengths = [len(request.targets) for request in requests]
        return [
            (float(logprobs.sum()), bool(greedy.all()))
            for logprobs, greedy in zip(logprob_S.split(lengths), greedy_S.split(lengths), strict=True)
        ]

    def _target_logprobs(
        self, hidden_PD: Tensor, position_S: Tensor, target_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each scored token, and true if it is the likeliest, on the CPU."""
        step = max(1, LOGITS_AT_A_TIME // text_config(self._model.config).vocab_size)
        logprob_S = torch.empty(len(position_S), dtype=torch.float32, device=hidden_PD.device)
        greedy_S = torch.empty(len(position_S), dtype=torch.bool, device=hidden_PD.device)
        for first in range(0, len(hidden_PD), step):
            logits_PV = self._head(hidden_PD[first : first + step])
            logprobs_PV = F.log_softmax(logits_PV, dim=-1, dtype=torch.float32)
            here = ((position_S >= first) & (position_S < first + step)).nonzero()[:, 0]
            position, target = position_S[here] - first, target_S[here]
            logprob_S[here] = logprobs_PV[position, target]
            greedy_S[here] = logprobs_PV.argmax(-1)[position] == target
        return logprob_S.cpu(), greedy_S.cpu()
