"""Scoring a model's layers: in one process, or one shard of the sequences and candidates at a time."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.contracts import ModelRef, Progress, ScoreResult, ScoreSpec, no_progress
from actors.data import calibration_sequences, load_texts
from actors.models import (
    build_model,
    depth,
    device,
    load_source,
    load_streamed,
    load_tokenizer,
    text_config,
)
from actors.models.loading.load import load_config
from actors.models.loading.tokens import check_token_ids
from actors.models.offloading.dispatch import input_device
from actors.out_of_memory import once_more_with_less
from actors.scoring.criteria import (
    MergeCriterion,
    as_layer_criterion,
    criterion_of,
    find_criterion,
    removal_order,
)
from actors.scoring.early_elimination import ROUND_SEQUENCES, surviving_candidates
from actors.scoring.laco import merge_result
from actors.scoring.measures.calibration import Calibration
from actors.scoring.measures.memory_budget import GIB, default_budget
from actors.scoring.measures.wavefront import ForwardCounter

ScoreRows = list[list[float]]
"""One row a calibration sequence, one score a candidate: [S][C]."""

SEQUENCES_PER_LOCAL_SHARD = 16
"""Sequences that one process scores between two reports of progress."""


def score_layers(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    criterion: str = "hidden_cosine",
    *,
    reference: PreTrainedModel | None = None,
    pooling: str = "flatten",
    seed: int = 0,
    num_remove: int = 1,
    memory_budget: int | None = None,
) -> list[float]:
    """Score every block of `model` as a candidate for removal.

    Args:
        model: a decoder language model of N blocks, in eval mode.
        sequences: token ids, one 1-D LongTensor [T] a sequence, without padding.
        criterion: a name in `CRITERIA`.
        reference: the model whose output is to be kept; `model` itself if None.
        pooling: for `hidden_cosine`: `flatten`, `token_mean` or `last_token`.
        num_remove: for `angular_block`: how many blocks go together.
        memory_budget: bytes that hidden states may take, beside the weights.

    Returns:
        One float a block, in the order of the blocks.
    """
    chosen = as_layer_criterion(find_criterion(criterion, pooling))
    calibration = Calibration(sequences, reference, pooling, seed, num_remove, memory_budget=memory_budget)
    rows = chosen.measure(model, calibration)
    if not chosen.uses_sequences:
        return rows[0].tolist()
    return chosen.combine(rows, chosen.weights([len(sequence) for sequence in sequences])).tolist()


@dataclass(frozen=True)
class Shard:
    """A part of the work: sequences × candidates (layers of the scored model, ascending)."""

    positions: tuple[int, ...]
    candidates: tuple[int, ...]


@dataclass(frozen=True)
class ShardScores:
    """Scores of a shard: one row a sequence, one score a candidate."""

    rows: ScoreRows
    layer_forwards: int


Compute = Callable[[list[Shard]], Iterable[tuple[Shard, ShardScores]]]
"""Computes shards somewhere and yields each with its scores, in any order."""


class Scorer:
    """Scores shards of one `ScoreSpec`; loads its models once, at first use.

    Args:
        memory_share: share of the memory budget that hidden states may take.

    Raises:
        RequestError: the criterion is unknown, measures no layers, or cannot do what the spec requires.
    """

    def __init__(self, spec: ScoreSpec, memory_share: float = 1.0):
        self.spec = spec
        self.criterion = as_layer_criterion(criterion_of(spec))
        self._memory_share = memory_share

    @cached_property
    def _model(self) -> PreTrainedModel:
        if self.spec.stream_weights:
            return load_streamed(self.spec.model, device())
        return build_model(self.spec.model)[0].to(device())

    @cached_property
    def _reference(self) -> PreTrainedModel | None:
        """The unpruned model, where the criterion compares with it and it is not the scored one."""
        pruned = self.spec.model != ModelRef(self.spec.model.source)
        if self.spec.reference != "source" or not pruned:
            return None
        if self.spec.stream_weights:
            return load_streamed(ModelRef(self.spec.model.source), device())
        return load_source(self.spec.model)[0].to(device())

    @cached_property
    def sequences(self) -> list[Tensor]:
        """Token ids of every calibration sequence; none if the criterion does not read text."""
        if not self.criterion.uses_sequences:
            return []
        text = self.spec.calibration
        tokenizer = load_tokenizer(self.spec.model.source)
        sequences = calibration_sequences(
            load_texts(text), tokenizer, self.spec.sequence_length, self.spec.max_sequences, repr(text.name)
        )
        check_token_ids(sequences, tokenizer, text_config(load_config(self.spec.model.source)).vocab_size)
        return sequences

    @cached_property
    def source_layers(self) -> tuple[int, ...]:
        """Source layer index of each layer of the scored model."""
        return self.spec.model.kept(depth(load_config(self.spec.model.source)))

    @property
    def num_layers(self) -> int:
        """Layers of the scored model."""
        return len(self.source_layers)

    def rounds(self) -> list[list[int]]:
        """Return the positions of the sequences, in the portions after which candidates may be eliminated."""
        positions = list(range(max(1, len(self.sequences))))
        if self.spec.confidence is None:
            return [positions]
        # Neighbours in a text are alike; the first portion should stand for all of it.
        random.Random(self.spec.seed).shuffle(positions)
        return [
            positions[start : start + ROUND_SEQUENCES] for start in range(0, len(positions), ROUND_SEQUENCES)
        ]

    def shards(
        self,
        count: int,
        positions: Sequence[int] | None = None,
        candidates: Sequence[int] | None = None,
        *,
        at_least: int = 1,
    ) -> list[Shard]:
        """Divide the sequences (all, if None) into at most `count` shards of like size and like lengths.

        Where there are fewer sequences than `at_least`, the candidates are divided, too;
        sequences whose scores hang together stay in one shard.
        """
        positions = range(max(1, len(self.sequences))) if positions is None else positions
        chosen = tuple(range(self.num_layers) if candidates is None else candidates)
        count = 1 if self.criterion.joint else min(count, len(positions))
        if self.sequences:
            positions = sorted(positions, key=lambda i: (-len(self.sequences[i]), i))
        parts = -(-at_least // count) if self.criterion.by_candidate else 1
        parts = max(1, min(parts, len(chosen)))
        return [
            Shard(tuple(positions[i::count]), chosen[part::parts])
            for i in range(count)
            for part in range(parts)
        ]

    def score(self, shard: Shard) -> ShardScores:
        """Return the scores of the shard's candidates on its sequences, in its order."""
        model, spec, counter = self._model, self.spec, ForwardCounter()
        sequences = [self.sequences[i].to(model.device) for i in shard.positions if self.sequences]
        budget = None if spec.memory_budget_gb is None else int(spec.memory_budget_gb * GIB)
        if self._memory_share < 1:
            budget = int((budget or default_budget(input_device(model))) * self._memory_share)
        calibration = Calibration(
            sequences,
            self._reference,
            spec.pooling,
            spec.seed,
            spec.num_remove,
            candidates=shard.candidates,
            memory_budget=budget,
            counter=counter,
        )
        rows = self.criterion.measure(model, calibration).double()[:, list(shard.candidates)]
        passed = counter.layer_forwards or self.criterion.forwards(depth(model.config), len(sequences))
        return ShardScores(rows.tolist(), passed)


class ScoreTable:
    """Scores of sequences × layers, filled in as shards are done; holds the surviving candidates."""

    def __init__(self, scorer: Scorer):
        self._scorer, self._num_winners = scorer, scorer.spec.num_remove
        self._rows = torch.zeros(max(1, len(scorer.sequences)), scorer.num_layers, dtype=torch.float64)
        self._known = torch.zeros_like(self._rows, dtype=torch.bool)
        self._weights = torch.ones(1, dtype=torch.float64)
        if scorer.sequences:
            self._weights = scorer.criterion.weights([len(sequence) for sequence in scorer.sequences])
        self._layer_forwards = 0
        self.candidates = tuple(range(scorer.num_layers))

    @property
    def num_sequences(self) -> int:
        """Sequences that all present candidates have been scored on."""
        return int(self._known[:, list(self.candidates)].all(1).sum())

    def add(self, shard: Shard, scores: ShardScores) -> None:
        """Enter the scores of a shard."""
        place = (torch.tensor(shard.positions)[:, None], torch.tensor(shard.candidates))
        self._rows[place] = torch.tensor(scores.rows, dtype=torch.float64)
        self._known[place] = True
        self._layer_forwards += scores.layer_forwards

    def eliminate(self, confidence: float, looks: int) -> None:
        """Drop candidates that, at this level of confidence, are not the next to be removed."""
        seen = self._known[:, list(self.candidates)].all(1)
        weights = self._weights[seen]
        rows = self._rows[seen][:, list(self.candidates)] * (weights / weights.mean())[:, None]
        sign = 1 if self._scorer.criterion.highest_first else -1
        left = surviving_candidates(sign * rows, self._num_winners, confidence, looks)
        self.candidates = tuple(self.candidates[c] for c in left)

    @property
    def decided(self) -> bool:
        """No more candidates are left than will be removed."""
        return len(self.candidates) <= self._num_winners

    def result(self) -> ScoreResult:
        """Return the scores; an eliminated layer has that of the sequences it was scored on, and is last."""
        scorer, criterion = self._scorer, self._scorer.criterion
        scores = []
        for layer in range(scorer.num_layers):
            known = self._known[:, layer]
            score = criterion.combine(self._rows[known, layer, None], self._weights[known])
            scores.append(score.item())
        run = scorer.spec.num_remove if criterion.chooses_run else 1
        order = removal_order(scores, criterion.highest_first, run)
        order.sort(key=lambda layer: layer not in self.candidates)
        sequences = scorer.sequences
        return ScoreResult(
            source_layers=scorer.source_layers,
            scores=tuple(scores),
            removal_order=tuple(scorer.source_layers[layer] for layer in order),
            num_sequences=len(sequences),
            num_tokens=sum(len(sequence) for sequence in sequences),
            layer_forwards=self._layer_forwards,
            layer_forwards_saved=self._saved(),
        )

    def _saved(self) -> int:
        """Return the cost of the unknown cells: the blocks after candidate i, N for a new sequence."""
        num_layers = self._scorer.num_layers
        passed = torch.arange(num_layers - 1, -1, -1)
        unseen = int((~self._known.any(1)).sum())
        return int((~self._known * passed).sum()) + unseen * num_layers


def run_shards(
    scorer: Scorer, compute: Compute, count: int, at_least: int = 1, progress: Progress = no_progress
) -> ScoreResult:
    """Have all shards computed, in as many rounds as the spec's confidence requires."""
    table, rounds = ScoreTable(scorer), scorer.rounds()
    total = sum(len(positions) for positions in rounds)
    for positions in rounds:
        if scorer.spec.confidence and table.num_sequences:
            table.eliminate(scorer.spec.confidence, len(rounds))
            if table.decided:
                break
        shards = scorer.shards(count, positions, table.candidates, at_least=at_least)
        for shard, scores in compute(shards):
            table.add(shard, scores)
            progress(table.num_sequences, total, "sequences")
    return table.result()


def score_locally(spec: ScoreSpec, progress: Progress = no_progress) -> ScoreResult:
    """Score in this process, one shard after another."""
    if isinstance(criterion_of(spec), MergeCriterion):
        return merge_result(spec)

    def score(memory_share: float) -> ScoreResult:
        scorer = Scorer(spec, memory_share)

        def compute(shards: list[Shard]) -> Iterable[tuple[Shard, ShardScores]]:
            return ((shard, scorer.score(shard)) for shard in shards)

        # A shard reads a streamed model's files once, so there is only one.
        count = 1 if spec.stream_weights else -(-len(scorer.sequences) // SEQUENCES_PER_LOCAL_SHARD)
        return run_shards(scorer, compute, max(1, count), progress=progress)

    return once_more_with_less(score, **memory_shares(spec))


def memory_shares(spec: ScoreSpec) -> dict[str, Any]:
    """Return how a scoring that lacks memory is tried again; see `once_more_with_less`."""
    return {
        "size": 1.0,
        "smaller": 0.5,
        "what": f"scoring of {spec.model.source.path!r}",
        "setting": "scoring.memory_budget_gb",
        "remedy": "lower scoring.sequence_length, set scoring.stream_weights, or use a larger device",
    }
