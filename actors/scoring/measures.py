"""What a layer, or its attention or MLP alone, does for a model: the measures that `CRITERIA` names.

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

from actors.errors import RequestError
from actors.models import BLOCK, LayerwisePass, depth, find_layers, without_sub_block
from actors.scoring.angular import run_distances
from actors.scoring.likelihood import negative_log_likelihoods
from actors.scoring.pooling import POOLING
from actors.scoring.wavefront import UNPRUNED, Outcome, Tally, Wave, last_hiddens, wavefront, waves
from actors.scoring.weight_measures import first_order_taylor, weight_norms


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
        tally: where measures that pass blocks in ways of their own count them.
        granularity: what of a layer would go: the block, its attention or its MLP.
    """

    sequences: Sequence[Tensor]
    reference: PreTrainedModel | None = None
    pooling: str = "flatten"
    seed: int = 0
    num_remove: int = 1
    candidates: Sequence[int] | None = None
    memory_budget: int | None = None
    tally: Tally = field(default_factory=Tally)
    granularity: str = BLOCK

    def waves(self, model: PreTrainedModel) -> list[Wave]:
        """The sequences and candidates in portions that keep the memory budget."""
        return waves(model, self.sequences, self.candidates, self.memory_budget)

    def outcomes(self, model: PreTrainedModel, wave: Wave, *, keep_unpruned: bool) -> Iterator[Outcome]:
        """The candidates of `wave` after the last block; see `wavefront`."""
        return wavefront(
            model,
            self.sequences,
            wave,
            keep_unpruned=keep_unpruned,
            tally=self.tally,
            granularity=self.granularity,
        )

    def no_rows(self, model: PreTrainedModel) -> Tensor:
        """Rows for every sequence and layer, nothing scored yet: [S, N] of NaN, float64."""
        return torch.full((len(self.sequences), depth(model.config)), torch.nan, dtype=torch.float64)


Measure = Callable[[PreTrainedModel, Calibration], Tensor]


@torch.no_grad()
def hidden_cosine(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Cosine of the last hidden states of the reference and the model without layer i. [S, N]"""
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
    return rows


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
    """Mean negative log-likelihood of the tokens 2..T under the model without layer i, in nats. [S, N]

    Their mean over tokens becomes the perplexity (`Criterion.link`). A sequence
    of one token predicts nothing: its row is 0 and weighs nothing.
    """
    rows = calibration.no_rows(model)
    for wave in calibration.waves(model):
        for outcome in calibration.outcomes(model, wave, keep_unpruned=False):
            nats_CG = negative_log_likelihoods(outcome, calibration.sequences, calibration.memory_budget)
            for g, position in enumerate(outcome.positions):
                rows[position, list(outcome.streams)] = nats_CG[:, g].cpu()
    return rows


@torch.no_grad()
def block_influence(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """1 − mean over tokens of the cosine of the stream before and after a block, or its sub-block. [S, N]

    Attention stands between what the block receives and what it gives without its
    MLP, the MLP between that and what the block gives.
    """
    rows = []
    for sequence in calibration.sequences:
        walk = LayerwisePass(model, sequence[None])
        entering, row = walk.hidden_BTD, []
        for index in range(depth(model.config)):
            leaving = walk.block(index, entering)
            before, after = entering, leaving
            if calibration.granularity != BLOCK:
                with without_sub_block(find_layers(model).modules[index], "mlp"):
                    between = walk.block(index, entering)
                before, after = (
                    (entering, between) if calibration.granularity == "attention" else (between, after)
                )
            row.append(1 - cosine_similarity(before.float(), after.float(), dim=-1).mean())
            entering = leaving
        rows.append(torch.stack(row))
    passes = 1 if calibration.granularity == BLOCK else 2
    calibration.tally.layer_forwards += passes * depth(model.config) * len(rows)
    return torch.stack(rows)


def angular_block(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Angular distance at the last token between the input of block i and that of block i + n. [S, N]"""
    return run_distances(model, calibration.sequences, calibration.num_remove)


def magnitude_l1(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Sum of the absolute values of the weight matrices. [1, N]"""
    return weight_norms(model, 1, calibration.granularity)[None]


def magnitude_l2(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """Sum of the Frobenius norms of the weight matrices. [1, N]"""
    return weight_norms(model, 2, calibration.granularity)[None]


def taylor(model: PreTrainedModel, calibration: Calibration) -> Tensor:
    """First-order change of the mean loss if the weight matrices were zero, weight by weight. [S, N]"""
    changes = first_order_taylor(model, calibration.sequences, calibration.granularity)
    return changes.expand(len(calibration.sequences), -1)


def task_metric(_model: PreTrainedModel, _calibration: Calibration) -> Tensor:
    """Refuses: whole models are evaluated by the evaluation room, which the orchestrator asks for it."""
    raise RequestError(
        "task_metric evaluates whole models on an lm-eval task and so runs in a campaign only; "
        "name it as methods[].scoring.criterion with scoring.task"
    )


def laco(_model: PreTrainedModel, _calibration: Calibration) -> Tensor:
    """Refuses: merges are tried one upon another, so that layers have no scores of their own."""
    raise RequestError("laco merges layers and does not score them; call actors.scoring.laco.laco_compress")


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
