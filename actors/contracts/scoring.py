"""Requests and results of scoring."""

from dataclasses import dataclass

from actors.contracts.artifacts import ArtifactRef
from actors.contracts.data import TextSpec
from actors.contracts.models import BLOCK, Merge, ModelRef


@dataclass(frozen=True)
class TaskSpec:
    """The lm-eval task that decides for the criterion `task_metric`.

    `tasks_fingerprint` is as in `EvaluationSpec`.
    """

    name: str
    metric: str = "acc"
    higher_is_better: bool = True
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    batch_size: int | None = None
    tasks_fingerprint: str | None = None
    apply_chat_template: bool = False


@dataclass(frozen=True)
class MergeSpec:
    """How the criterion `laco` merges (LaCo, Algorithm 1); `actors.scoring.laco` says what each means."""

    variant: str = "differences"
    threshold: float = 0.65
    group: int = 4
    interval: int = 2
    lowest: int = 0
    highest: int | None = None


@dataclass(frozen=True)
class ScoreSpec:
    """Score every remaining layer of `model` as a candidate for removal.

    `granularity` says what of it would go: the `block`, its `attention` or its `mlp`.
    `num_remove` is how many layers will go before the next scoring, for what
    depends on it. `task` is for `task_metric`, `merge` for `laco`.
    `memory_budget_gb` (GiB) bounds the memory that hidden states take. With
    `stream_weights`, layers are read from their files one at a time. With
    `confidence`, candidates that are at this level sure not to be removed next
    are no longer scored.
    """

    model: ModelRef
    calibration: TextSpec
    criterion: str = "hidden_cosine"
    reference: str = "source"
    pooling: str = "flatten"
    max_sequences: int | None = None
    sequence_length: int = 512
    seed: int = 0
    num_remove: int = 1
    task: TaskSpec | None = None
    merge: MergeSpec | None = None
    memory_budget_gb: float | None = None
    stream_weights: bool = False
    confidence: float | None = None
    granularity: str = BLOCK


@dataclass(frozen=True)
class ScoreResult:
    """One score a candidate layer; how to read it is the criterion's matter.

    `source_layers[i]` is the source layer index of `scores[i]`. `removal_order`
    lists source layers from the first to remove to the last. `merges` says where
    the layers to remove go, if they are merged rather than dropped.
    `layer_forwards` counts how often a sequence passed a block;
    `layer_forwards_saved` how much more often it would have, had no candidate
    been given up early.
    """

    source_layers: tuple[int, ...]
    scores: tuple[float, ...]
    removal_order: tuple[int, ...]
    num_sequences: int
    num_tokens: int
    layer_forwards: int
    merges: tuple[Merge, ...] = ()
    layer_forwards_saved: int = 0


@dataclass(frozen=True)
class Removal:
    """What a model loses next: `source_layers` of a granularity, each with its score, and their merges.

    In a dry run the layers are not known before they are scored: `placeholder` then stands for
    the choice, named by the stage that will decide.
    """

    granularity: str
    source_layers: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    merges: tuple[Merge, ...] = ()
    placeholder: ArtifactRef | None = None

    def applied_to(self, model: ModelRef) -> ModelRef:
        """Return `model` without those layers."""
        if self.placeholder is not None:
            return model.adapted(self.placeholder)
        return model.pruned(self.granularity, self.source_layers).merged(self.merges)
