"""What makes a layer worth removing: one function and one row of `CRITERIA` each.

Every measure returns one row of scores for each calibration sequence it is given,
[S, N]; a layer's score is the mean over sequences, so any split of the sequences
over processes gives the same scores.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from actors.errors import RequestError, unknown_name
from actors.models import LayerwisePass, depth
from actors.scoring.wavefront import candidate_hidden, last_hidden, layer_forwards

TIE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Calibration:
    """What a criterion may look at.

    Attributes:
        sequences: token ids [T] of each calibration sequence; lengths differ.
        reference: the model whose output is to be kept (None: the scored model).
        pooling: how a sequence's tokens become one similarity, see `POOLING`.
        seed: for criteria that draw.
    """

    sequences: Sequence[Tensor]
    reference: PreTrainedModel | None = None
    pooling: str = "flatten"
    seed: int = 0


Measure = Callable[[PreTrainedModel, Calibration], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A row of `CRITERIA`.

    Attributes:
        measure: gives [S, N] scores (or [1, N] where sequences do not matter).
        highest_first: remove the layer of the highest score first, else the lowest.
        uses_sequences: whether the scores depend on calibration text.
        forwards: layer-forwards spent on S sequences by a model of N layers.
        source: paper and equation.
    """

    measure: Measure
    highest_first: bool
    uses_sequences: bool
    forwards: Callable[[int, int], int]
    source: str


def flatten_cosine(a_TD: Tensor, b_NTD: Tensor) -> Tensor:
    """Cosine of the whole states as one vector each, as LaCo's code does. [N]"""
    return cosine_similarity(a_TD.flatten()[None], b_NTD.flatten(1), dim=-1)


def token_mean_cosine(a_TD: Tensor, b_NTD: Tensor) -> Tensor:
    """Mean over tokens of the cosine at each token. [N]"""
    return cosine_similarity(a_TD[None], b_NTD, dim=-1).mean(-1)


def last_token_cosine(a_TD: Tensor, b_NTD: Tensor) -> Tensor:
    """Cosine at the last token. [N]"""
    return cosine_similarity(a_TD[None, -1], b_NTD[:, -1], dim=-1)


POOLING = {"flatten": flatten_cosine, "token_mean": token_mean_cosine, "last_token": last_token_cosine}


def hidden_cosine(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Cosine of the last hidden states of the reference and the model without layer i. [S, N]"""
    pool = POOLING[calibration.pooling]
    rows = []
    for sequence in calibration.sequences:
        hidden = candidate_hidden(model, sequence).float()
        reference = hidden[0]
        if calibration.reference is not None:
            reference = last_hidden(calibration.reference, sequence).float()
        rows.append(pool(reference, hidden[1:]))
    return torch.stack(rows)


@torch.no_grad()
def block_influence(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """1 − mean over tokens of the cosine between a block's input and its output. [S, N]"""
    rows = []
    for sequence in calibration.sequences:
        walk = LayerwisePass(model, sequence[None])
        entering, row = walk.hidden_BTD, []
        for index in range(depth(model.config)):
            leaving = walk.block(index, entering)
            row.append(1 - cosine_similarity(entering.float(), leaving.float(), dim=-1).mean())
            entering = leaving
        rows.append(torch.stack(row))
    return torch.stack(rows)


def deepest(model: PreTrainedModel, _calibration: Calibration) -> Tensor:
    """Depth, with the last block kept to the end. [1, N]"""
    scores = torch.arange(depth(model.config), dtype=torch.float32)
    scores[-1] = -1
    return scores[None]


def reverse(model: PreTrainedModel, _calibration: Calibration) -> Tensor:
    """Depth: from the tail. [1, N]"""
    return torch.arange(depth(model.config), dtype=torch.float32)[None]


def random(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Uniform draws by seed. [1, N]"""
    generator = torch.Generator().manual_seed(calibration.seed)
    return torch.rand(1, depth(model.config), generator=generator)


def _one_pass(num_layers: int, num_sequences: int) -> int:
    return num_layers * num_sequences


def _no_pass(_num_layers: int, _num_sequences: int) -> int:
    return 0


CRITERIA: dict[str, Criterion] = {
    "hidden_cosine": Criterion(
        hidden_cosine,
        True,
        True,
        layer_forwards,
        "IteRABRe (arXiv 2503.06291) §3.1; LaCo (arXiv 2402.11187) §2",
    ),
    "block_influence": Criterion(
        block_influence, False, True, _one_pass, "ShortGPT (arXiv 2403.03853) §2.3, Eq. 1"
    ),
    "deepest": Criterion(
        deepest, True, False, _no_pass, "The Unreasonable Ineffectiveness of the Deeper Layers §4.4"
    ),
    "reverse": Criterion(reverse, True, False, _no_pass, "On the Limits of Layer Pruning §2: from the tail"),
    "random": Criterion(random, True, False, _no_pass, "seeded draw, the baseline of every comparison"),
}


def find_criterion(name: str, pooling: str = "flatten") -> Criterion:
    """The criterion of that name.

    Raises:
        RequestError: an unknown criterion or pooling, with the nearest names.
    """
    if name not in CRITERIA:
        raise unknown_name("criterion", name, CRITERIA)
    if pooling not in POOLING:
        raise unknown_name("pooling", pooling, POOLING)
    return CRITERIA[name]


def removal_order(scores: Sequence[float], highest_first: bool) -> list[int]:
    """Positions from the first to remove to the last; within a tie the deeper goes first.

    Raises:
        RequestError: a score is not a number (the model's output overflowed).
    """
    if any(score != score for score in scores):
        raise RequestError(
            f"layer {[s != s for s in scores].index(True)} scored NaN; score in float32 or bfloat16"
        )
    return list(_best_first([s if highest_first else -s for s in scores]))


def _best_first(values: Sequence[float]) -> Iterator[int]:
    left = list(range(len(values)))
    while left:
        best = max(values[i] for i in left)
        chosen = max(i for i in left if values[i] >= best - TIE_TOLERANCE)
        left.remove(chosen)
        yield chosen
