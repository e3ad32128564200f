"""What makes a layer worth removing: one row of `CRITERIA` each, its function in `measures`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.errors import RequestError, unknown_name
from actors.models import BLOCK, check_granularity
from actors.plugins import find_row
from actors.scoring import measures
from actors.scoring.measures import Measure
from actors.scoring.pooling import POOLING
from actors.scoring.wavefront import layer_forwards

TIE_TOLERANCE = 1e-6


def _alike(_num_tokens: int) -> float:
    return 1.0


def _as_it_is(mean_C: Tensor) -> Tensor:
    return mean_C


@dataclass(frozen=True)
class Criterion:
    """A row of `CRITERIA`.

    Attributes:
        measure: gives [S, N] scores (or [1, N] where sequences do not matter); what was not asked for is NaN.
        highest_first: remove the layer of the highest score first, else the lowest.
        uses_sequences: whether the scores depend on calibration text.
        forwards: layer-forwards spent on S sequences by a model of N layers.
        source: paper and section.
        equation: what is computed, in plain text.
        chooses_run: the layers to go are chosen together, `num_remove` of them: the score at a layer
            is that of the run from it on.
        joint: the sequences' rows cannot be computed apart (a measure gives the same row for each).
        by_task: there is nothing to measure here, an lm-eval task decides (`actors.scoring.task_metric`).
        by_merge: layers are merged, all at once, rather than dropped (`actors.scoring.laco`).
        by_candidate: scores the `candidates` of the calibration alone, any part of them by itself,
            and can walk over a model whose weights are streamed.
        blocks_only: has no meaning for attention or MLP alone.
        seeded: the scores depend on the seed.
        weight: how much a sequence of T tokens counts in a layer's score.
        link: from the weighted mean of a layer's rows to its score.
    """

    measure: Measure
    highest_first: bool
    uses_sequences: bool
    forwards: Callable[[int, int], int]
    source: str
    equation: str = ""
    chooses_run: bool = False
    joint: bool = False
    by_task: bool = False
    by_merge: bool = False
    by_candidate: bool = False
    blocks_only: bool = False
    seeded: bool = False
    weight: Callable[[int], float] = _alike
    link: Callable[[Tensor], Tensor] = _as_it_is

    def weights(self, lengths: Sequence[int]) -> Tensor:
        """How much sequences of these lengths count. [S]"""
        return torch.tensor([self.weight(length) for length in lengths], dtype=torch.float64)

    def combine(self, rows_SC: Tensor, weights_S: Tensor) -> Tensor:
        """Scores of the candidates from the rows of the sequences. [C], float64"""
        mean_C = (rows_SC.double() * weights_S[:, None]).sum(0) / weights_S.sum()
        return self.link(mean_C)


def _predicted(num_tokens: int) -> float:
    return num_tokens - 1


def _one_pass(num_layers: int, num_sequences: int) -> int:
    return num_layers * num_sequences


def _no_pass(_num_layers: int, _num_sequences: int) -> int:
    return 0


def _there_and_back(num_layers: int, num_sequences: int) -> int:
    return 2 * num_layers * num_sequences


CRITERIA: dict[str, Criterion] = {
    "hidden_cosine": Criterion(
        measures.hidden_cosine,
        True,
        True,
        layer_forwards,
        "IteRABRe (arXiv 2503.06291) §3.1; LaCo (arXiv 2402.11187) §2",
        "mean_d cos(h(M_ref)_d, h(M without i)_d)",
        by_candidate=True,
    ),
    "perplexity": Criterion(
        measures.perplexity,
        False,
        True,
        layer_forwards,
        "Shortened LLaMA (arXiv 2402.02834) §3.2; SLEB (arXiv 2402.09025) §3",
        "exp of the mean next-token loss of M without i",
        by_candidate=True,
        weight=_predicted,
        link=torch.exp,
    ),
    "block_influence": Criterion(
        measures.block_influence,
        False,
        True,
        _one_pass,
        "ShortGPT (arXiv 2403.03853) §2.3, Eq. 1",
        "1 − mean_t cos(x_i,t, x_i+1,t)",
    ),
    "angular_block": Criterion(
        measures.angular_block,
        False,
        True,
        _one_pass,
        "The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887) §3.2, Eq. 6 and 7",
        "arccos(cos(x_i,T, x_i+n,T)) / π for the run of n blocks from i on",
        chooses_run=True,
        blocks_only=True,
    ),
    "deepest": Criterion(
        measures.deepest,
        True,
        False,
        _no_pass,
        "The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887) §4.4",
        "i, the last block kept to the end",
    ),
    "reverse": Criterion(
        measures.reverse,
        True,
        False,
        _no_pass,
        "Reassessing Layer Pruning (arXiv 2411.15558), reverse order; On the Limits of Layer Pruning "
        "(arXiv 2602.01997) §2",
        "i",
    ),
    "taylor": Criterion(
        measures.taylor,
        False,
        True,
        _there_and_back,
        "Shortened LLaMA (arXiv 2402.02834) §3, Taylor; LLM-Pruner (arXiv 2305.11627) §3.2",
        "Σ_k Σ_ij abs(W_k,ij · ∂L/∂W_k,ij), L the mean next-token loss",
        joint=True,
    ),
    "magnitude_l1": Criterion(
        measures.magnitude_l1,
        False,
        False,
        _no_pass,
        "Shortened LLaMA (arXiv 2402.02834) §3, Magnitude; Reassessing Layer Pruning (arXiv 2411.15558)",
        "Σ_k ‖W_k‖₁, entrywise",
    ),
    "magnitude_l2": Criterion(
        measures.magnitude_l2,
        False,
        False,
        _no_pass,
        "Reassessing Layer Pruning (arXiv 2411.15558), Magnitude-L2",
        "Σ_k ‖W_k‖₂, entrywise (Frobenius)",
    ),
    "task_metric": Criterion(
        measures.task_metric,
        True,
        False,
        _no_pass,
        "On the Limits of Layer Pruning (arXiv 2602.01997), Algorithm 1, “Iterative”",
        "metric of an lm-eval task on M without i",
        by_task=True,
        seeded=True,
    ),
    "laco": Criterion(
        measures.laco,
        True,
        True,
        _no_pass,
        "LaCo (arXiv 2402.11187) §2, Eq. 1 and Algorithm 1",
        "merges i+1..i+m into i: θ_i + Σ_k (θ_i+k − θ_i), kept while mean_d cos(h(M_ref)_d, h(merged)_d) > T",
        chooses_run=True,
        by_merge=True,
        blocks_only=True,
    ),
    "random": Criterion(
        measures.random,
        True,
        False,
        _no_pass,
        "seeded draw, the baseline of every comparison",
        "uniform in 0..1",
        seeded=True,
    ),
}


def find_criterion(name: str, pooling: str = "flatten", granularity: str = BLOCK) -> Criterion:
    """The criterion of that name, ours or of another installed package.

    Raises:
        RequestError: an unknown criterion, pooling or granularity, with the nearest names,
            or a criterion of whole blocks for something else.
    """
    criterion = find_row("criterion", name, CRITERIA, Criterion)
    if pooling not in POOLING:
        raise unknown_name("pooling", pooling, POOLING)
    check_granularity(granularity)
    if granularity != BLOCK and criterion.blocks_only:
        raise RequestError(
            f"criterion {name!r} chooses whole blocks and has no meaning for {granularity} alone; "
            "set granularity: block or take another criterion"
        )
    return criterion


def removal_order(scores: Sequence[float], highest_first: bool, run: int = 1) -> list[int]:
    """Positions from the first to remove to the last; within a tie the deeper goes first.

    With `run` > 1 a score is that of the run of so many layers from its position on:
    the best run that fits comes first, ascending, then the other layers by their scores.

    Raises:
        RequestError: a score is not a number (the model's output overflowed).
    """
    if any(score != score for score in scores):
        raise RequestError(
            f"layer {[s != s for s in scores].index(True)} scored NaN; score in float32 or bfloat16"
        )
    order = list(_best_first([s if highest_first else -s for s in scores]))
    start = next(i for i in order if i + run <= len(scores))
    together = range(start, start + run)
    return [*together, *(i for i in order if i not in together)]


def _best_first(values: Sequence[float]) -> Iterator[int]:
    left = list(range(len(values)))
    while left:
        best = max(values[i] for i in left)
        chosen = max(i for i in left if values[i] >= best - TIE_TOLERANCE)
        left.remove(chosen)
        yield chosen
