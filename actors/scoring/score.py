"""Scoring a model's layers: in one process, or a share of the calibration sequences at a time."""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from actors.contracts import Progress, ScoreResult, ScoreSpec, no_progress
from actors.data import calibration_sequences, load_texts
from actors.models import device, load_source, load_tokenizer, materialize
from actors.scoring.criteria import Calibration, find_criterion, removal_order
from actors.scoring.merge import merge_result

ScoreRows = list[list[float]]
"""One row a calibration sequence, one score a layer: [S][N]."""


def score_layers(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    criterion: str = "hidden_cosine",
    *,
    reference: PreTrainedModel | None = None,
    pooling: str = "flatten",
    seed: int = 0,
    num_remove: int = 1,
) -> list[float]:
    """Score every block of `model` as a candidate for removal.

    Args:
        model: a decoder language model of N blocks, in eval mode.
        sequences: token ids, one 1-D LongTensor [T] a sequence, without padding.
        criterion: a name in `CRITERIA`.
        reference: the model whose output is to be kept; `model` itself if None.
        pooling: for `hidden_cosine`: `flatten`, `token_mean` or `last_token`.
        num_remove: for `angular_block`: how many blocks go together.

    Returns:
        One float a block, in the order of the blocks.
    """
    chosen = find_criterion(criterion, pooling)
    rows = chosen.measure(model, Calibration(sequences, reference, pooling, seed, num_remove)).double()
    return rows.mean(0).tolist()


class Scorer:
    """Scores shares of one `ScoreSpec`'s calibration sequences; loads its models once, at first use."""

    def __init__(self, spec: ScoreSpec):
        self.spec = spec
        self.criterion = find_criterion(spec.criterion, spec.pooling)

    @cached_property
    def _model(self) -> PreTrainedModel:
        return materialize(self.spec.model)[0].to(device())

    @cached_property
    def _reference(self) -> PreTrainedModel | None:
        """The unpruned model, where the criterion compares with it and it is not the scored one."""
        pruned = self.spec.model.dropped or self.spec.model.adapters
        if self.spec.reference != "source" or not pruned:
            return None
        return load_source(self.spec.model)[0].to(device())

    @cached_property
    def sequences(self) -> list[Tensor]:
        """Token ids of every calibration sequence."""
        texts = load_texts(self.spec.calibration)
        tokenizer = load_tokenizer(self.spec.model.source)
        return calibration_sequences(texts, tokenizer, self.spec.sequence_length, self.spec.max_sequences)

    def shares(self, count: int) -> list[list[int]]:
        """The sequences' positions in at most `count` shares of like size.

        One share if text is not used or the sequences' scores hang together.
        """
        if not self.criterion.uses_sequences:
            return [[0]]
        positions = list(range(len(self.sequences)))
        if self.criterion.joint:
            return [positions]
        count = min(count, len(positions))
        return [positions[i::count] for i in range(count)]

    def score(self, positions: Sequence[int]) -> ScoreRows:
        """Score rows of the sequences at `positions`, in that order."""
        model = self._model
        sequences = [self.sequences[i].to(model.device) for i in positions]
        spec = self.spec
        calibration = Calibration(sequences, self._reference, spec.pooling, spec.seed, spec.num_remove)
        return self.criterion.measure(model, calibration).double().tolist()

    def result(self, rows: dict[int, list[float]]) -> ScoreResult:
        """Put together the rows of all sequences, by position, in whatever order they came."""
        num_layers = len(rows[0])
        scores = [sum(rows[i][layer] for i in sorted(rows)) / len(rows) for layer in range(num_layers)]
        kept = self.spec.model.kept(num_layers + len(self.spec.model.dropped))
        run = self.spec.num_remove if self.criterion.chooses_run else 1
        order = removal_order(scores, self.criterion.highest_first, run)
        used = self.sequences if self.criterion.uses_sequences else []
        return ScoreResult(
            source_layers=kept,
            scores=tuple(scores),
            removal_order=tuple(kept[i] for i in order),
            num_sequences=len(used),
            num_tokens=sum(len(sequence) for sequence in used),
            layer_forwards=self.criterion.forwards(num_layers, len(used)),
        )


def score_locally(spec: ScoreSpec, progress: Progress = no_progress) -> ScoreResult:
    """Score in this process, one sequence after another."""
    if find_criterion(spec.criterion).by_merge:
        return merge_result(spec)
    scorer = Scorer(spec)
    shares = scorer.shares(count=2**31)
    rows: dict[int, list[float]] = {}
    for done, share in enumerate(shares, start=1):
        rows.update(zip(share, scorer.score(share), strict=True))
        progress(done, len(shares), "sequences")
    return scorer.result(rows)
