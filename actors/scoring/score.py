"""Scoring a model's layers: in one process, or one shard of the sequences and candidates at a time."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from actors.contracts import ModelRef, Progress, ScoreResult, ScoreSpec, digest, no_progress
from actors.data import calibration_sequences, load_texts
from actors.models import (
    build_model,
    depth,
    device,
    load_source,
    load_streamed,
    load_tokenizer,
    places,
    text_config,
)
from actors.models.loading.load import load_config
from actors.models.loading.tokens import check_token_ids
from actors.models.offloading.dispatch import input_device
from actors.out_of_memory import once_more_with_less
from actors.scoring.criteria import (
    FixedCriterion,
    MergeCriterion,
    as_layer_criterion,
    criterion_of,
    find_criterion,
)
from actors.scoring.fixed import fixed_result
from actors.scoring.laco import merge_result
from actors.scoring.measures.calibration import Calibration
from actors.scoring.measures.kept_streams import KeptStreams, name_of
from actors.scoring.measures.memory_budget import GIB, costs_of, default_budget
from actors.scoring.measures.reference import Reference
from actors.scoring.measures.wavefront import ForwardCounter
from actors.scoring.memory_shares import memory_shares
from actors.scoring.score_table import ScoreTable, in_doubt, score_result

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
    calibration = Calibration(
        sequences,
        Reference(None if reference is None else lambda: reference),
        pooling,
        seed,
        num_remove,
        memory_budget=memory_budget,
    )
    rows = chosen.measure(model, calibration).cpu()
    if not chosen.uses_sequences:
        return rows[0].tolist()
    return chosen.combine(rows, chosen.weights([len(sequence) for sequence in sequences])).tolist()


@dataclass(frozen=True)
class Shard:
    """A part of the work: sequences × candidates (layers of the scored model, ascending).

    Attributes:
        screened: in the screening dtype.
        again: the sequences will come again for other candidates.
    """

    positions: tuple[int, ...]
    candidates: tuple[int, ...]
    screened: bool = False
    again: bool = False


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
        self._streams: dict[bool, KeptStreams] = {}

    @cached_property
    def _model(self) -> PreTrainedModel:
        if self.spec.stream_weights:
            return load_streamed(self.spec.model, device())
        return build_model(self.spec.model, places())[0]

    @cached_property
    def _screening_model(self) -> PreTrainedModel:
        """The model in the screening dtype; buffers, such as those of rotary embeddings, stay as they are."""
        source = self.spec.model.source
        if self.spec.stream_weights and self.spec.screen_dtype:
            rounded = replace(self.spec.model, source=replace(source, dtype=self.spec.screen_dtype))
            return load_streamed(rounded, device())
        model = copy.deepcopy(self._model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        return model

    @cached_property
    def _reference(self) -> Reference:
        """The unpruned model's states, where the criterion compares with it, else the scored one's own."""
        source = self.spec.model.source
        pruned = self.spec.model != ModelRef(source)
        versions = [torch.__version__, transformers.__version__]
        kept_as = source.contents and digest(
            [source.contents, source.dtype, source.trust_remote_code, device().type, *versions]
        )
        if not pruned:
            return Reference(kept_as=kept_as)
        if self.spec.reference != "source":
            return Reference()
        if self.spec.stream_weights:
            return Reference(lambda: load_streamed(ModelRef(source), device()), kept_as)
        return Reference(lambda: load_source(self.spec.model, places())[0], kept_as)

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

    @property
    def candidates(self) -> range:
        """Layers that are scored: all of the scored model."""
        return range(self.num_layers)

    @property
    def removable(self) -> list[int]:
        """Those of them that may go."""
        return [i for i, layer in enumerate(self.source_layers) if layer not in self.spec.protected]

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
        spec, counter = self.spec, ForwardCounter()
        model = self._screening_model if shard.screened else self._model
        sequences = [self.sequences[i].to(input_device(model)) for i in shard.positions if self.sequences]
        reference = self._reference
        if shard.screened and reference.load is None:
            # What is kept was computed in float32, and so is what comes to it.
            reference = reference.given_by(lambda: self._model, self._kept(self._model, screened=False))
        kept, budget = self._kept(model, shard.screened), self._budget(model)
        calibration = Calibration(
            sequences,
            reference,
            spec.pooling,
            spec.seed,
            spec.num_remove,
            candidates=shard.candidates,
            memory_budget=budget - kept.num_bytes if budget and kept else budget,
            counter=counter,
            kept=kept,
        )
        rows = self.criterion.measure(model, calibration).double()[:, list(shard.candidates)]
        if kept is not None and not shard.again:
            kept.release([name_of(ids_T) for ids_T in sequences])
        passed = counter.layer_forwards
        if not self.criterion.by_candidate:
            passed = passed or self.criterion.forwards(depth(model.config), len(sequences))
        return ShardScores(rows.tolist(), passed)

    def _budget(self, model: PreTrainedModel) -> int | None:
        """Return the bytes that hidden states may take; None for what is usual."""
        spec = self.spec
        budget = None if spec.memory_budget_gb is None else int(spec.memory_budget_gb * GIB)
        if self._memory_share < 1 or spec.eliminate or spec.screen_dtype:
            budget = int((budget or default_budget(input_device(model))) * self._memory_share)
        return budget

    def _kept(self, model: PreTrainedModel, screened: bool) -> KeptStreams | None:
        """Return the streams kept for sequences that come again: at most a quarter of the budget."""
        comes_again = self.spec.eliminate or (self.spec.screen_dtype and not screened)
        budget = self._budget(model)
        if not comes_again or budget is None:
            return None
        if screened not in self._streams:
            least = costs_of(model).least(max(map(len, self.sequences)))
            room = max(0, min(budget // 4, budget - least))
            self._streams[screened] = KeptStreams(room, depth(model.config))
        return self._streams[screened]


def run_shards(
    scorer: Scorer, compute: Compute, count: int, at_least: int = 1, progress: Progress = no_progress
) -> ScoreResult:
    """Have all computed that decides which layers go next, at most `count` shards at a time.

    That is everything in one round, or with `eliminate` what the rounds before leave open. With
    `screen_dtype` it is first computed in that, then for those in doubt in the model's own.
    """

    def fill(table: ScoreTable, candidates: Sequence[int], again: bool = False) -> None:
        while (cells := table.next_cells(candidates, again)) is not None:
            shards = scorer.shards(count, cells.positions, cells.candidates, at_least=at_least)
            shards = [replace(shard, screened=table.screened, again=cells.again) for shard in shards]
            for shard, scores in compute(shards):
                table.add(shard, scores)
                progress(table.progress(candidates), table.num_sequences, "sequences")

    removable = scorer.removable
    # What may not go is scored for the record, but not where layers are given up as soon as they cannot win.
    scored = removable if scorer.spec.eliminate else scorer.candidates
    table = ScoreTable(scorer)
    if scorer.spec.screen_dtype is None:
        fill(table, scored)
        return score_result(table)
    screened = ScoreTable(scorer, screened=True)
    fill(screened, scored)
    best_C = screened.sign * screened.best(removable)
    first = best_C.argsort(descending=True)[: scorer.spec.num_remove].tolist()
    confirmed = doubtful = sorted(removable[c] for c in first)
    while doubtful:
        fill(table, confirmed, again=True)
        doubtful = in_doubt(table, screened)
        confirmed = sorted([*confirmed, *doubtful])
    return score_result(table, screened)


def score_in_process(
    spec: ScoreSpec, memory_share: float = 1.0, progress: Progress = no_progress
) -> ScoreResult:
    """Score in this process, one shard after another, with a share of the memory budget."""
    criterion = criterion_of(spec)
    if isinstance(criterion, MergeCriterion):
        return merge_result(spec)
    if isinstance(criterion, FixedCriterion):
        return fixed_result(spec)
    scorer = Scorer(spec, memory_share)

    def compute(shards: list[Shard]) -> Iterable[tuple[Shard, ShardScores]]:
        return ((shard, scorer.score(shard)) for shard in shards)

    # A shard reads a streamed model's files once, so there is only one.
    count = 1 if spec.stream_weights else -(-len(scorer.sequences) // SEQUENCES_PER_LOCAL_SHARD)
    return run_shards(scorer, compute, max(1, count), progress=progress)


def score_locally(spec: ScoreSpec, progress: Progress = no_progress) -> ScoreResult:
    """Score in this process; where memory does not suffice, once more with half of the budget."""
    return once_more_with_less(
        lambda memory_share: score_in_process(spec, memory_share, progress), **memory_shares(spec)
    )
