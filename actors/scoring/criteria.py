"""What makes a layer worth removing: one function and one row of `CRITERIA` each.

Every measure returns one row of scores for each calibration sequence it is given,
[S, N]; a layer's score is the mean over sequences, so any split of the sequences
over processes gives the same scores.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from actors.errors import RequestError, unknown_name
from actors.models import LayerwisePass, depth
from actors.scoring.angular import run_distances
from actors.scoring.likelihood import negative_log_likelihoods
from actors.scoring.pooling import POOLING
from actors.scoring.wavefront import (
    UNPRUNED,
    Outcome,
    Tally,
    Wave,
    last_hiddens,
    layer_forwards,
    wavefront,
    waves,
)
from actors.scoring.weights import first_order_taylor, weight_norms

TIE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Calibration:
    """What a criterion may look at.

    Attributes:
        sequences: token ids [T] of each calibration sequence; lengths differ.
        reference: the model whose output is to be kept (None: the scored model).
        pooling: how a sequence's tokens become one similarity, see `POOLING`.
        seed: for criteria that draw.
        num_remove: layers that will go together, for criteria that choose a run of them.
        candidates: the layers to score, ascending (None: all); for criteria that score `by_candidate`.
        memory_budget: bytes that hidden states may take (None: as is usual on the device).
        tally: where criteria that score `by_candidate` count their layer-forwards.
    """

    sequences: Sequence[Tensor]
    reference: PreTrainedModel | None = None
    pooling: str = "flatten"
    seed: int = 0
    num_remove: int = 1
    candidates: Sequence[int] | None = None
    memory_budget: int | None = None
    tally: Tally = field(default_factory=Tally)

    def waves(self, model: PreTrainedModel) -> list[Wave]:
        """The sequences and candidates in portions that keep the memory budget."""
        return waves(model, self.sequences, self.candidates, self.memory_budget)

    def outcomes(self, model: PreTrainedModel, wave: Wave, *, keep_unpruned: bool) -> Iterator[Outcome]:
        """The candidates of `wave` after the last block; see `wavefront`."""
        return wavefront(model, self.sequences, wave, keep_unpruned=keep_unpruned, tally=self.tally)

    def no_rows(self, model: PreTrainedModel) -> Tensor:
        """Rows for every sequence and layer, nothing scored yet: [S, N] of NaN, float64."""
        return torch.full((len(self.sequences), depth(model.config)), torch.nan, dtype=torch.float64)

    def asked(self, rows_SN: Tensor) -> Tensor:
        """The columns of the layers to score. [S, C]"""
        return rows_SN if self.candidates is None else rows_SN[:, list(self.candidates)]


Measure = Callable[[PreTrainedModel, Calibration], Tensor]


def _alike(_num_tokens: int) -> float:
    return 1.0


def _as_it_is(mean_C: Tensor) -> Tensor:
    return mean_C


@dataclass(frozen=True)
class Criterion:
    """A row of `CRITERIA`.

    Attributes:
        measure: gives [S, N] scores (or [1, N] where sequences do not matter).
        highest_first: remove the layer of the highest score first, else the lowest.
        uses_sequences: whether the scores depend on calibration text.
        forwards: layer-forwards spent on S sequences by a model of N layers.
        source: paper and section.
        equation: what is computed, in plain text.
        chooses_run: the layers to go are chosen together, `num_remove` of them: the score at a layer
            is that of the run from it on.
        joint: the sequences' rows cannot be computed apart (a measure gives the same row for each).
        by_task: there is nothing to measure here, an lm-eval task decides (`actors.scoring.task`).
        by_merge: layers are merged, all at once, rather than dropped (`actors.scoring.merge`).
        by_candidate: scores any part of the candidates by itself, [S, C] for the `candidates`
            of the calibration, and can walk over a model whose weights are streamed.
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


@torch.no_grad()
def hidden_cosine(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Cosine of the last hidden states of the reference and the model without layer i. [S, C]"""
    pool, own = POOLING[calibration.pooling], calibration.reference is None
    rows = calibration.no_rows(model)
    for wave in calibration.waves(model):
        references = _reference_hidden(calibration, wave.positions)
        for outcome in calibration.outcomes(model, wave, keep_unpruned=own):
            hidden_CGTD = outcome.last_hidden().float()
            if outcome.streams[0] == UNPRUNED:
                references |= zip(outcome.positions, hidden_CGTD[0].clone(), strict=True)
            first = outcome.streams.count(UNPRUNED)
            layers = list(outcome.streams[first:])
            for g, position in enumerate(outcome.positions):
                rows[position, layers] = pool(references[position], hidden_CGTD[first:, g]).double().cpu()
    return calibration.asked(rows)


def _reference_hidden(calibration: Calibration, positions: Sequence[int]) -> dict[int, Tensor]:
    """The last hidden state [T, D] of another reference at each of the sequences; empty if there is none."""
    if calibration.reference is None:
        return {}
    sequences = [calibration.sequences[i] for i in positions]
    hidden = last_hiddens(
        calibration.reference, sequences, budget=calibration.memory_budget, tally=calibration.tally
    )
    return {position: h.float() for position, h in zip(positions, hidden, strict=True)}


@torch.no_grad()
def perplexity(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Mean negative log-likelihood of the tokens 2..T under the model without layer i, in nats. [S, C]

    Their mean over tokens becomes the perplexity (`Criterion.link`). A sequence
    of one token predicts nothing: its row is 0 and weighs nothing.
    """
    rows = calibration.no_rows(model)
    for wave in calibration.waves(model):
        for outcome in calibration.outcomes(model, wave, keep_unpruned=False):
            nats_CG = negative_log_likelihoods(outcome, calibration.sequences, calibration.memory_budget)
            for g, position in enumerate(outcome.positions):
                rows[position, list(outcome.streams)] = nats_CG[:, g].cpu()
    return calibration.asked(rows)


def _predicted(num_tokens: int) -> float:
    return num_tokens - 1


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


def angular_block(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Angular distance at the last token between the input of block i and that of block i + n. [S, N]"""
    return run_distances(model, calibration.sequences, calibration.num_remove)


def magnitude_l1(model: PreTrainedModel, _calibration: Calibration) -> Tensor:
    """Sum of the absolute values of a block's weight matrices. [1, N]"""
    return weight_norms(model, 1)[None]


def magnitude_l2(model: PreTrainedModel, _calibration: Calibration) -> Tensor:
    """Sum of the Frobenius norms of a block's weight matrices. [1, N]"""
    return weight_norms(model, 2)[None]


def taylor(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """First-order change of the mean loss if a block's weights were zero, weight by weight. [S, N]"""
    return first_order_taylor(model, calibration.sequences).expand(len(calibration.sequences), -1)


def task_metric(_model: PreTrainedModel, _calibration: Calibration) -> Tensor:
    """Refuses: whole models are evaluated by the evaluation room, which the orchestrator asks for it."""
    raise RequestError(
        "task_metric evaluates whole models on an lm-eval task and so runs in a campaign only; "
        "name it as methods[].scoring.criterion with scoring.task"
    )


def laco(_model: PreTrainedModel, _calibration: Calibration) -> Tensor:
    """Refuses: merges are tried one upon another, so that layers have no scores of their own."""
    raise RequestError("laco merges layers and does not score them; call actors.scoring.merge.laco_compress")


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


def _there_and_back(num_layers: int, num_sequences: int) -> int:
    return 2 * num_layers * num_sequences


CRITERIA: dict[str, Criterion] = {
    "hidden_cosine": Criterion(
        hidden_cosine,
        True,
        True,
        layer_forwards,
        "IteRABRe (arXiv 2503.06291) §3.1; LaCo (arXiv 2402.11187) §2",
        "mean_d cos(h(M_ref)_d, h(M without i)_d)",
        by_candidate=True,
    ),
    "perplexity": Criterion(
        perplexity,
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
        block_influence,
        False,
        True,
        _one_pass,
        "ShortGPT (arXiv 2403.03853) §2.3, Eq. 1",
        "1 − mean_t cos(x_i,t, x_i+1,t)",
    ),
    "angular_block": Criterion(
        angular_block,
        False,
        True,
        _one_pass,
        "The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887) §3.2, Eq. 6 and 7",
        "arccos(cos(x_i,T, x_i+n,T)) / π for the run of n blocks from i on",
        chooses_run=True,
    ),
    "deepest": Criterion(
        deepest,
        True,
        False,
        _no_pass,
        "The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887) §4.4",
        "i, the last block kept to the end",
    ),
    "reverse": Criterion(
        reverse,
        True,
        False,
        _no_pass,
        "Reassessing Layer Pruning (arXiv 2411.15558), reverse order; On the Limits of Layer Pruning "
        "(arXiv 2602.01997) §2",
        "i",
    ),
    "taylor": Criterion(
        taylor,
        False,
        True,
        _there_and_back,
        "Shortened LLaMA (arXiv 2402.02834) §3, Taylor; LLM-Pruner (arXiv 2305.11627) §3.2",
        "Σ_k Σ_ij abs(W_k,ij · ∂L/∂W_k,ij), L the mean next-token loss",
        joint=True,
    ),
    "magnitude_l1": Criterion(
        magnitude_l1,
        False,
        False,
        _no_pass,
        "Shortened LLaMA (arXiv 2402.02834) §3, Magnitude; Reassessing Layer Pruning (arXiv 2411.15558)",
        "Σ_k ‖W_k‖₁, entrywise",
    ),
    "magnitude_l2": Criterion(
        magnitude_l2,
        False,
        False,
        _no_pass,
        "Reassessing Layer Pruning (arXiv 2411.15558), Magnitude-L2",
        "Σ_k ‖W_k‖₂, entrywise (Frobenius)",
    ),
    "task_metric": Criterion(
        task_metric,
        True,
        False,
        _no_pass,
        "On the Limits of Layer Pruning (arXiv 2602.01997), Algorithm 1, “Iterative”",
        "metric of an lm-eval task on M without i",
        by_task=True,
        seeded=True,
    ),
    "laco": Criterion(
        laco,
        True,
        True,
        _no_pass,
        "LaCo (arXiv 2402.11187) §2, Eq. 1 and Algorithm 1",
        "merges i+1..i+m into i: θ_i + Σ_k (θ_i+k − θ_i), kept while mean_d cos(h(M_ref)_d, h(merged)_d) > T",
        chooses_run=True,
        by_merge=True,
    ),
    "random": Criterion(
        random,
        True,
        False,
        _no_pass,
        "seeded draw, the baseline of every comparison",
        "uniform in 0..1",
        seeded=True,
    ),
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
