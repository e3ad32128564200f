"""Requests and results of scoring."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, MinLen

from actors.contracts import names
from actors.contracts.artifacts import ArtifactRef
from actors.contracts.data import TextSettings, TextSpec
from actors.contracts.models import Merge, ModelRef
from actors.contracts.settings import AddedLater, Doc, InKeyAs, Known, NotInKey, Settings

ScoreKind = Literal["exact", "bound", "screened", "screened_bound"]
"""What a score is: its value, or what it is at best; the same as seen in the screening dtype."""

SCORE_METRICS: Mapping[ScoreKind, str] = {
    "exact": "score",
    "bound": "score_bound",
    "screened": "score_screened",
    "screened_bound": "score_screened_bound",
}
"""What the ledger calls a layer's score, by what it is."""


@dataclass(frozen=True)
class TaskSettings(Settings):
    """The lm-eval task that decides for the criterion `task_metric`."""

    name: Annotated[str, MinLen(1), Doc("Name of the task or group.")]
    metric: Annotated[str, Doc("Its metric, as evaluation names it: acc, acc_norm, …")] = "acc"
    higher_is_better: Annotated[bool, Doc("False for an error or a perplexity.")] = True
    limit: Annotated[int | None, Ge(1), Doc("Only the first so many documents.")] = None
    num_fewshot: Annotated[int | None, Ge(0), Doc("Examples in the prompt; the task's own if not given.")] = (
        None
    )


@dataclass(frozen=True)
class TaskSpec(TaskSettings):
    """The deciding task, put as evaluation puts its tasks; see `EvaluationSettings`."""

    include_path: Annotated[str | None, NotInKey()] = None
    batch_size: Annotated[int | None, NotInKey()] = None
    tasks_fingerprint: Annotated[str | None, InKeyAs("include_path")] = None
    apply_chat_template: Annotated[bool, AddedLater(False)] = False
    system_instruction: Annotated[str | None, AddedLater(None)] = None


@dataclass(frozen=True)
class MergeSpec(Settings):
    """How the criterion `laco` merges layers (LaCo, Algorithm 1)."""

    variant: Annotated[str, Doc("differences (Eq. 1) or in_place (the published code).")] = "differences"
    threshold: Annotated[float, Ge(-1), Le(1), Doc("Least cosine to the unmerged model's output.")] = 0.65
    group: Annotated[int, Ge(2), Doc("Layers that become one.")] = 4
    interval: Annotated[int, Ge(1), Doc("Least distance of two layers that take others in.")] = 2
    lowest: Annotated[int, Ge(0), Doc("Lowest layer that may take others in.")] = 0
    highest: Annotated[int | None, Ge(1), Doc("Layers below this one are merged; all by default.")] = None


@dataclass(frozen=True)
class Ends(Settings):
    """Layers at the two ends of a model."""

    first: Annotated[int, Ge(0), Doc("So many from the first on.")] = 0
    last: Annotated[int, Ge(0), Doc("So many up to the last.")] = 0


@dataclass(frozen=True, kw_only=True)
class ScoringSettings(Settings):
    """How the next layer to remove is chosen."""

    REMOVED: ClassVar[Mapping[str, Any]] = {"granularity": "block", "confidence": None}

    criterion: Annotated[
        str, Known(names.CRITERIA), Doc("A name in the table of criteria, or a plug-in's.")
    ] = "hidden_cosine"
    reference: Annotated[
        Literal["source", "current"],
        Doc("Model whose output is to be kept: the unpruned or the current one."),
    ] = "source"
    pooling: Annotated[str, Doc("For hidden_cosine: flatten, token_mean or last_token.")] = "flatten"
    calibration: TextSettings = TextSettings(builtin="iterabre-appendix-a")
    max_sequences: Annotated[int | None, Ge(1), Doc("Use only the first so many sequences.")] = None
    sequence_length: Annotated[int, Ge(2), Doc("Longer sequences are cut to so many tokens.")] = 512
    task: Annotated[TaskSettings | None, Doc("What decides for task_metric; for no other criterion.")] = None
    merge: Annotated[MergeSpec | None, Doc("How laco merges; for no other criterion.")] = None
    layers: Annotated[
        tuple[Annotated[int, Ge(0)], ...],
        AddedLater(()),
        Doc(
            "For fixed: layers of the unpruned model, first to go first; a target takes as many as it needs."
        ),
    ] = ()
    protected: Annotated[
        Ends | tuple[Annotated[int, Ge(0)], ...],
        AddedLater(()),
        Doc("Layers that stay, whatever they score: {first: 1, last: 1}, or a list of the unpruned model's."),
    ] = ()
    memory_budget_gb: Annotated[
        float | None,
        Gt(0),
        Doc("GiB that hidden states may take, beside the weights; changes no score."),
        NotInKey(),
    ] = None
    stream_weights: Annotated[
        bool, Doc("Read layers from their files one at a time, for models larger than memory."), NotInKey()
    ] = False
    eliminate: Annotated[
        bool,
        Doc(
            "Give up a layer as soon as it is proved not to be the next to go; its score is then a bound. "
            "For hidden_cosine, perplexity and kl; the choice is that of scoring all."
        ),
        AddedLater(False),
    ] = False
    screen_dtype: Annotated[
        Literal["bfloat16"] | None,
        Doc(
            "Score in this dtype first, and in float32 only what comes near the best. A measured rule, "
            "not a proof: docs/criteria.md."
        ),
        AddedLater(None),
    ] = None


MERGING_CRITERIA = frozenset({"laco"})
"""Criteria that merge layers and drop none, as their rows say: here for processes without torch."""


@dataclass(frozen=True, kw_only=True)
class ScoreSpec(ScoringSettings):
    """Score every remaining layer of `model` as a candidate for removal.

    `num_remove` is how many layers will go before the next scoring, for what depends on it.
    `protected` are source layer indices.
    """

    model: ModelRef
    calibration: TextSpec
    task: TaskSpec | None = None
    protected: tuple[int, ...] = ()
    seed: int = 0
    num_remove: int = 1


@dataclass(frozen=True)
class ScoreResult:
    """One score a candidate layer; how to read it is the criterion's matter.

    `source_layers[i]` is the source layer index of `scores[i]`. `removal_order`
    lists source layers from the first to remove to the last, those left out that may not go. `merges`
    says where the layers to remove go, if they are merged rather than dropped.
    `layer_forwards` counts how often a sequence passed a block;
    `layer_forwards_saved` how much more often it would have, had no candidate
    been given up early. `kinds[i]` says what `scores[i]` is; where it is empty
    all are exact. The first of the order of removal, as many as will go, always are.
    """

    source_layers: tuple[int, ...]
    scores: tuple[float, ...]
    removal_order: tuple[int, ...]
    num_sequences: int
    num_tokens: int
    layer_forwards: int
    merges: tuple[Merge, ...] = ()
    layer_forwards_saved: int = 0
    kinds: tuple[ScoreKind, ...] = ()

    @property
    def kind_of_each(self) -> tuple[ScoreKind, ...]:
        """What each of `scores` is."""
        exact: ScoreKind = "exact"
        return self.kinds or (exact,) * len(self.scores)


@dataclass(frozen=True)
class Removal:
    """What a model loses next: `source_layers`, each with its score, and their merges.

    In a dry run the layers are not known before they are scored: `placeholder` then stands for
    the choice, named by the stage that will decide.
    """

    source_layers: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    merges: tuple[Merge, ...] = ()
    placeholder: ArtifactRef | None = None

    def applied_to(self, model: ModelRef) -> ModelRef:
        """Return `model` without those layers."""
        if self.placeholder is not None:
            return model.adapted(self.placeholder)
        return model.without(self.source_layers).merged(self.merges)
