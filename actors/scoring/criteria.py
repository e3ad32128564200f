"""The criteria: one row of `CRITERIA` each, with its paper; the measures they name are in `measures/`."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.contracts import ScoreSpec
from actors.errors import RequestError, unknown_name
from actors.plugins import find_row
from actors.scoring.measures import activations, angular, linear_maps, positions, taylor, weights
from actors.scoring.measures.calibration import Measure
from actors.scoring.measures.pooling import POOLING
from actors.scoring.measures.wavefront import layer_forwards

TIE_TOLERANCE = 1e-6
"""How far apart equal scores may be by rounding, relative to scores above 1, such as a perplexity."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A row of `CRITERIA`, of one of the types below.

    Attributes:
        source: paper and section.
        equation: what is computed, in plain text.
        highest_first: remove the layer of the highest score first, else the lowest.
        uses_sequences: the scores depend on calibration text.
        forwards: layer-forwards spent by a model of N layers on S sequences, where known beforehand.
        chooses_run: the layers to go are chosen together, `num_remove` of them: the score at a layer
            is that of the run from it on.
        seeded: the scores depend on the seed.
    """

    source: str
    equation: str = ""
    highest_first: bool
    uses_sequences: bool
    forwards: Callable[[int, int], int] = lambda num_layers, num_sequences: 0
    chooses_run: bool = False
    seeded: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerCriterion(Criterion):
    """Measures each layer of a model that is in memory; what other packages register.

    Attributes:
        measure: gives [S, N] scores (or [1, N] where sequences do not matter); what was not requested is NaN.
        joint: the sequences' rows cannot be computed apart (a measure gives the same row for each).
        by_candidate: scores the `candidates` of the calibration alone, any part of them by itself; is
            `by_block`, too.
        by_block: uses a block only where its weights are `resident`, so that they can be streamed.
        weight: how much a sequence of T tokens counts in a layer's score.
        link: from the weighted mean of a layer's rows to its score; it grows with it.
        best: the best that a sequence can say of a layer, where there is such a value: it bounds what
            was not computed (`scoring.eliminate`).
    """

    measure: Measure
    joint: bool = False
    by_candidate: bool = False
    by_block: bool = False
    weight: Callable[[int], float] = lambda num_tokens: 1.0
    link: Callable[[Tensor], Tensor] = lambda mean_C: mean_C
    best: float | None = None

    def weights(self, lengths: Sequence[int]) -> Tensor:
        """Return how much sequences of these lengths count. [S]"""
        return torch.tensor([self.weight(length) for length in lengths], dtype=torch.float64)

    def combine(self, rows_SC: Tensor, weights_S: Tensor) -> Tensor:
        """Return the scores of the candidates from the rows of the sequences. [C], float64"""
        mean_C = (rows_SC.double() * weights_S[:, None]).sum(0) / weights_S.sum()
        return self.link(mean_C)


@dataclass(frozen=True, kw_only=True)
class TaskCriterion(Criterion):
    """Evaluates each model that lacks one layer on an lm-eval task (`actors.scoring.task_metric`)."""


@dataclass(frozen=True, kw_only=True)
class FixedCriterion(Criterion):
    """Takes the layers that `scoring.layers` lists (`actors.scoring.fixed`)."""


@dataclass(frozen=True, kw_only=True)
class MergeCriterion(Criterion):
    """Merges layers, all at once, rather than dropping them (`actors.scoring.laco`)."""


def _one_pass(num_layers: int, num_sequences: int) -> int:
    return num_layers * num_sequences


CRITERIA: dict[str, Criterion] = {
    "hidden_cosine": LayerCriterion(
        source="IteRABRe (arXiv 2503.06291) §3.1; LaCo (arXiv 2402.11187) §2",
        equation="mean_d cos(h(M_ref)_d, h(M without i)_d)",
        measure=activations.hidden_cosine,
        highest_first=True,
        uses_sequences=True,
        forwards=layer_forwards,
        by_candidate=True,
        best=1.0,
    ),
    "perplexity": LayerCriterion(
        source="Shortened LLaMA (arXiv 2402.02834) §3.2; SLEB (arXiv 2402.09025) §3",
        equation="exp of the mean next-token loss of M without i",
        measure=activations.perplexity,
        highest_first=False,
        uses_sequences=True,
        forwards=layer_forwards,
        by_candidate=True,
        weight=lambda num_tokens: num_tokens - 1,
        link=torch.exp,
        best=0.0,
    ),
    "kl": LayerCriterion(
        source="EvoPress (arXiv 2410.14649), the fitness of its search",
        equation="mean_t KL(p(M_ref)_t ‖ p(M without i)_t), p_t the prediction at token t",
        measure=activations.kl,
        highest_first=False,
        uses_sequences=True,
        forwards=layer_forwards,
        by_candidate=True,
        weight=lambda num_tokens: num_tokens,
        best=0.0,
    ),
    "block_influence": LayerCriterion(
        source="ShortGPT (arXiv 2403.03853) §2.3, Eq. 1",
        equation="1 − mean_t cos(x_i,t, x_i+1,t)",
        measure=activations.block_influence,
        by_block=True,
        highest_first=False,
        uses_sequences=True,
        forwards=_one_pass,
    ),
    "angular_block": LayerCriterion(
        source="The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887) §3.2, Eq. 6 and 7",
        equation="arccos(cos(x_i,T, x_i+n,T)) / π for the run of n blocks from i on",
        measure=angular.angular_block,
        by_block=True,
        highest_first=False,
        uses_sequences=True,
        forwards=_one_pass,
        chooses_run=True,
    ),
    "bridge_residual": LayerCriterion(
        source="Your Transformer is Secretly Linear (arXiv 2405.12250), linearity of blocks; "
        "ReplaceMe (arXiv 2505.02819) §2.2, a map in place of a run",
        equation="mean_t ‖x_i,t (1 + A) − x_i+n,t‖² / ‖x_i+n,t‖² for the run of n blocks from i on, "
        "A fitted to other sequences",
        measure=linear_maps.bridge_residual,
        by_block=True,
        highest_first=False,
        uses_sequences=True,
        forwards=_one_pass,
        chooses_run=True,
        joint=True,
    ),
    "deepest": LayerCriterion(
        source="The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887) §4.4",
        equation="i, the last block kept to the end",
        measure=positions.deepest,
        by_block=True,
        highest_first=True,
        uses_sequences=False,
    ),
    "reverse": LayerCriterion(
        source="Reassessing Layer Pruning (arXiv 2411.15558), reverse order; On the Limits of Layer Pruning "
        "(arXiv 2602.01997) §2",
        equation="i",
        measure=positions.reverse,
        by_block=True,
        highest_first=True,
        uses_sequences=False,
    ),
    "taylor": LayerCriterion(
        source="Shortened LLaMA (arXiv 2402.02834) §3, Taylor; LLM-Pruner (arXiv 2305.11627) §3.2",
        equation="Σ_k Σ_ij abs(W_k,ij · ∂L/∂W_k,ij), L the mean next-token loss",
        measure=taylor.taylor,
        by_block=True,
        highest_first=False,
        uses_sequences=True,
        forwards=lambda num_layers, num_sequences: 2 * _one_pass(num_layers, num_sequences),
        joint=True,
    ),
    "magnitude_l1": LayerCriterion(
        source="Shortened LLaMA (arXiv 2402.02834) §3, Magnitude; "
        "Reassessing Layer Pruning (arXiv 2411.15558)",
        equation="Σ_k ‖W_k‖₁, entrywise",
        measure=weights.magnitude_l1,
        by_block=True,
        highest_first=False,
        uses_sequences=False,
    ),
    "magnitude_l2": LayerCriterion(
        source="Reassessing Layer Pruning (arXiv 2411.15558), Magnitude-L2",
        equation="Σ_k ‖W_k‖₂, entrywise (Frobenius)",
        measure=weights.magnitude_l2,
        by_block=True,
        highest_first=False,
        uses_sequences=False,
    ),
    "task_metric": TaskCriterion(
        source="On the Limits of Layer Pruning (arXiv 2602.01997), Algorithm 1, “Iterative”",
        equation="metric of an lm-eval task on M without i",
        highest_first=True,
        uses_sequences=False,
        seeded=True,
    ),
    "laco": MergeCriterion(
        source="LaCo (arXiv 2402.11187) §2, Eq. 1 and Algorithm 1",
        equation="merges i+1..i+m into i: θ_i + Σ_k (θ_i+k − θ_i), kept while "
        "mean_d cos(h(M_ref)_d, h(merged)_d) > T",
        highest_first=True,
        uses_sequences=True,
        chooses_run=True,
    ),
    "fixed": FixedCriterion(
        source="a list of layers, such as a paper's or PruneMe's",
        equation="layers from i to the end of `scoring.layers`, 0 for one that is not listed",
        highest_first=True,
        uses_sequences=False,
    ),
    "random": LayerCriterion(
        source="seeded draw, the baseline of every comparison",
        equation="uniform in 0..1",
        measure=positions.random,
        by_block=True,
        highest_first=True,
        uses_sequences=False,
        seeded=True,
    ),
}


def find_criterion(name: str, pooling: str = "flatten") -> Criterion:
    """Return the criterion of that name, ours or of another installed package.

    Raises:
        RequestError: an unknown criterion or pooling, with the nearest names.
    """
    criterion = find_row("criterion", name, CRITERIA, LayerCriterion)
    if pooling not in POOLING:
        raise unknown_name("pooling", pooling, POOLING)
    return criterion


def criterion_of(spec: ScoreSpec) -> Criterion:
    """Return the criterion that `spec` names.

    Raises:
        RequestError: it is unknown or cannot do what the spec requires.
    """
    criterion = find_criterion(spec.criterion, spec.pooling)
    by_candidate = isinstance(criterion, LayerCriterion) and criterion.by_candidate
    bounded = isinstance(criterion, LayerCriterion) and by_candidate and criterion.best is not None
    by_block = isinstance(criterion, LayerCriterion) and (by_candidate or criterion.by_block)
    able = {"stream_weights": by_block, "eliminate": bounded, "screen_dtype": by_candidate}
    for setting, possible in able.items():
        if getattr(spec, setting) and not possible:
            raise RequestError(f"scoring.{setting} does not go with criterion {spec.criterion!r}")
    if isinstance(criterion, FixedCriterion) and not spec.layers:
        raise RequestError(
            "the criterion 'fixed' needs the layers to go, in a campaign as scoring.layers; `iterabre prune "
            "--drop` takes a list, too"
        )
    if spec.screen_dtype and spec.model.source.dtype != "float32":
        raise RequestError(
            f"scoring.screen_dtype: {spec.screen_dtype} screens for scores in float32, and "
            f"{spec.model.source.path!r} is in {spec.model.source.dtype}; leave it out, or set the model's "
            "dtype: float32"
        )
    return criterion


def as_layer_criterion(criterion: Criterion) -> LayerCriterion:
    """Return `criterion` as one that measures layers.

    Raises:
        RequestError: it is of another type; says where that is computed.
    """
    if isinstance(criterion, LayerCriterion):
        return criterion
    if isinstance(criterion, TaskCriterion):
        raise RequestError(
            "task_metric evaluates whole models on an lm-eval task and so runs in a campaign only; "
            "name it as methods[].scoring.criterion with scoring.task"
        )
    if isinstance(criterion, FixedCriterion):
        raise RequestError("fixed takes the layers of scoring.layers and computes no scores")
    raise RequestError("laco merges layers and does not score them; call actors.scoring.laco.laco_compress")


def removal_order(
    scores: Sequence[float], highest_first: bool, run: int = 1, protected: Collection[int] = ()
) -> list[int]:
    """Return positions from the first to remove to the last; within a tie the deeper goes first.

    With `run` > 1 a score is that of the run of so many layers from its position on:
    the best run that fits comes first, ascending, then the other layers by their scores.
    `protected` positions are left out.

    Raises:
        RequestError: a score is not a number (the model's output overflowed), or protected layers
            leave no run.
    """
    if any(score != score for score in scores):
        raise RequestError(
            f"layer {[s != s for s in scores].index(True)} scored NaN; score in float32 or bfloat16"
        )
    values = [s if highest_first else -s for s in scores]
    order: list[int] = []
    left = [i for i in range(len(values)) if i not in protected]
    while left:
        best = max(values[i] for i in left)
        tied = best - TIE_TOLERANCE * max(1.0, abs(best))
        order.append(max(i for i in left if values[i] >= tied))
        left.remove(order[-1])
    runs = (range(i, i + run) for i in order)
    together = next((each for each in runs if set(each) <= set(order)), None)
    if together is None:
        raise RequestError(
            f"scoring.protected leaves no {run} layers in a row that could go; protect fewer, or lower "
            "schedule.layers_per_iteration"
        )
    return [*together, *(i for i in order if i not in together)]
