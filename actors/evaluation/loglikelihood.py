"""Log-likelihoods of continuations, with nothing computed twice and no logit that nobody asked for.

Sequences that begin alike are packed into prefix trees where the family lets
itself be run on them, which is tried out on a few tokens rather than read from
a list; else they run side by side, padded. The head runs at scored positions
alone, once for all sequences that meet there.

Shape letters: B rows, Q tokens of a row, D hidden, V vocabulary, P scored
positions, S scored tokens (several may be scored at one position).
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from actors.errors import WorkError
from actors.evaluation.prefix_tree import PrefixTree, plant
from actors.models import text_config
from actors.models.head import LogitHead

LOGITS_AT_A_TIME = 2**26
"""Entries of the largest P x V block of logits that exists at one time."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
"""Tokens of a batch to begin with when its size is to be found; halved whenever memory does not suffice."""

BOUNDING = ("window", "chunk")
"""Words in the names of config fields that say how far a token sees."""

PROBE = [[3, 5, 7, 9, 4, 6, 8], [3, 5, 7, 9, 4, 6, 10, 12], [3, 5, 7, 9, 6, 3], [3, 5, 8, 4, 9, 7, 3]]
"""Token sequences that branch at several depths; a model that mixes branches up gives itself away."""


@dataclass(frozen=True)
class Scored:
    """`targets` are the tokens after the last `len(targets)` tokens of `tokens`, the model's input."""

    tokens: list[int]
    targets: list[int]


class LikelihoodModel:
    """A causal language model that says how likely given tokens are.

    Args:
        model: on its device; put in eval mode.
        batch_tokens: tokens of a batch, padding counted; found by itself if None.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int | None = None):
        self._model = model.eval()
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
        self._body: Callable[..., Tensor]
        self._head: Callable[[Tensor], Tensor]
        if _head_stands_alone(model):
            self._body = lambda ids_BQ, **kwargs: (
                model.base_model(ids_BQ, use_cache=False, **kwargs).last_hidden_state
            )
            self._head = LogitHead(model)
        else:
            self._body = lambda ids_BQ, **kwargs: model(ids_BQ, use_cache=False, **kwargs).logits
            self._head = lambda logits: logits
        self.most_nodes = self._most_nodes()

    def loglikelihoods(self, requests: Sequence[Scored]) -> list[tuple[float, bool]]:
        """For each request, the log-probability of its targets and whether each is the likeliest token.

        Both as HFLM gives them: log-softmax and sum in the model's own type.

        Raises WorkError if memory does not suffice for a single row.
        """
        answers: dict[int, tuple[float, bool]] = {}
        trees = plant([request.tokens for request in requests], self.most_nodes)
        chains = sorted((tree for tree in trees if tree.is_chain), key=len, reverse=True)
        branched = sorted((tree for tree in trees if not tree.is_chain), key=len, reverse=True)
        for rows in chain(self._batches(chains), self._batches(branched)):
            members = [member for tree in rows for member in tree.members]
            scored = self._fitting(rows, [requests[member] for member in members])
            answers |= zip(members, scored, strict=True)
        return [answers[i] for i in range(len(requests))]

    def _batches(self, trees: list[PrefixTree]) -> Iterator[list[PrefixTree]]:
        """Rows of falling size; `batch_tokens` may have shrunk when the next are taken."""
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
                raise WorkError(
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
        device = self._model.device
        hidden_BQD = self._run(rows)
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

    def _run(self, rows: list[PrefixTree]) -> Tensor:
        """Final hidden states [B, Q, D]; what stands after a row's last node means nothing."""
        width = max(len(tree) for tree in rows)
        ids_BQ = torch.tensor([_padded(tree.tokens, width) for tree in rows], device=self._model.device)
        if all(tree.is_chain for tree in rows):
            return self._body(ids_BQ)
        positions_BQ = torch.tensor([_padded(tree.depths, width) for tree in rows], device=ids_BQ.device)
        # Padding sees itself, since a softmax over nothing is not a number.
        sees_BQQ = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
        for row, tree in enumerate(rows):
            sees_BQQ[row, : len(tree), : len(tree)] = tree.sees()
        dtype = self._model.dtype
        mask_BQQ = torch.zeros(sees_BQQ.shape, dtype=dtype, device=ids_BQ.device)
        mask_BQQ.masked_fill_(~sees_BQQ.to(ids_BQ.device), torch.finfo(dtype).min)
        return self._body(ids_BQ, attention_mask=mask_BQQ[:, None], position_ids=positions_BQ)

    def _target_logprobs(
        self, hidden_PD: Tensor, position_S: Tensor, target_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each scored token, and whether it is the likeliest there; both on the CPU."""
        step = max(1, LOGITS_AT_A_TIME // text_config(self._model.config).vocab_size)
        logprob_S = torch.empty(len(position_S), dtype=hidden_PD.dtype, device=hidden_PD.device)
        greedy_S = torch.empty(len(position_S), dtype=torch.bool, device=hidden_PD.device)
        for first in range(0, len(hidden_PD), step):
            logprobs_PV = F.log_softmax(self._head(hidden_PD[first : first + step]), dim=-1)
            here = ((position_S >= first) & (position_S < first + step)).nonzero()[:, 0]
            position, target = position_S[here] - first, target_S[here]
            logprob_S[here] = logprobs_PV[position, target].to(logprob_S.dtype)
            greedy_S[here] = logprobs_PV.argmax(-1)[position] == target
        return logprob_S.cpu(), greedy_S.cpu()

    @torch.inference_mode()
    def _most_nodes(self) -> int | None:
        """Nodes that a tree may have in this family: 0 if it cannot be run on trees, None if without bound.

        A sliding window is counted in rows by some families and in depths by
        others; in a row no longer than the window, it makes no difference.
        """
        (probe,) = plant(PROBE, None)
        bound = _window(self._model)
        accepted = inspect.signature(type(self._model.base_model).forward).parameters
        if not {"attention_mask", "position_ids"} <= accepted.keys():
            return 0
        if bound is not None and bound < len(probe):
            return 0
        try:
            tree_QD = self._run([probe])[0]
        except (TypeError, ValueError, RuntimeError):  # the family makes its own mask from one that is flat
            return 0
        alone = [self._body(torch.tensor([sequence], device=tree_QD.device))[0] for sequence in PROBE]
        paths = dict(zip(probe.members, probe.paths, strict=True))
        return bound if all(_agree(tree_QD[paths[i]], alone_QD) for i, alone_QD in enumerate(alone)) else 0


def _padded(values: list[int], length: int) -> list[int]:
    return values + [0] * (length - len(values))


@torch.inference_mode()
def _head_stands_alone(model: PreTrainedModel) -> bool:
    """Whether the logits are those of the family's head on its backbone's last hidden states."""
    if model.base_model is model:
        return False
    ids_BT = torch.tensor(PROBE[:1], device=model.device)
    hidden_BTD = model.base_model(ids_BT, use_cache=False).last_hidden_state
    return _agree(LogitHead(model)(hidden_BTD), model(ids_BT, use_cache=False).logits)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether the two differ by no more than rounding: √ε of their type, relative to their norm."""
    difference = (found.float() - expected.float()).norm() / expected.float().norm()
    return bool(difference < torch.finfo(expected.dtype).eps ** 0.5)


def _window(model: PreTrainedModel) -> int | None:
    """The smallest number of tokens that the config lets a token see, None if it sets no such bound."""
    values = vars(text_config(model.config)).items()
    bounds = [
        value
        for name, value in values
        if any(word in name for word in BOUNDING) and not name.endswith("layers")  # Qwen2 counts layers so
        if type(value) is int and value > 0
    ]
    return min(bounds, default=None)
