"""Source models, models on a trajectory, and their export."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import MinLen

from actors.contracts.artifacts import ArtifactRef
from actors.contracts.settings import Doc, LocalPath, Settings

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ModelDtype = Literal["float32", "bfloat16", "float16", "auto"]


@dataclass(frozen=True)
class ModelSettings(Settings):
    """A source model."""

    path: Annotated[
        str,
        MinLen(1),
        LocalPath(),
        Doc("Hub id, local directory, GGUF file, or package://PACKAGE/FILE.gguf."),
    ]
    dtype: Annotated[
        ModelDtype, Doc("Type of the weights in memory; `auto` for the one that the checkpoint has.")
    ] = "float32"
    revision: Annotated[str | None, Doc("Branch, tag or commit of a hub model.")] = None
    trust_remote_code: Annotated[bool, Doc("Run code that the model's repository brings.")] = False


@dataclass(frozen=True)
class ModelSpec(ModelSettings):
    """Where a source model comes from and how it is loaded.

    A plan adds what it found: the `commit` that the revision of a hub model stood for, which is read from
    then on, and the hash of the model's files.
    """

    commit: str | None = field(default=None, compare=False)
    contents: str | None = field(default=None, compare=False)
    """Hash of the model's files as `describe_model` found them; if it is given, they must still be those."""


@dataclass(frozen=True)
class Origin:
    """The hub's metadata that an exported model takes over; None where the source does not say."""

    base_model: str | None = None
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a source model without loading its weights.

    `fingerprint` changes whenever the weights or the configuration change.
    `block_parameters[i]` is the size of block i. D is the width of the hidden
    state, and attention mixes `attention_width` numbers a token (H times the
    width of a head). `block_widths` is the sum of the in- and output widths of
    a block's matrices, the size of a low-rank update of rank 1. `context_length` is
    the longest input that the configuration names, `position_limit` the longest that
    the model can compute; None where there is no such limit.
    """

    spec: ModelSpec
    model_type: str
    num_layers: int
    num_parameters: int
    vocab_size: int
    fingerprint: str
    block_parameters: tuple[int, ...] = ()
    hidden_size: int = 0
    attention_width: int = 0
    num_heads: int = 1
    block_widths: int = 0
    context_length: int | None = None
    position_limit: int | None = None


@dataclass(frozen=True)
class Merge:
    """The source layers `merged` go into the source layer `base`; `variant` is a name in `MERGES`."""

    base: int
    merged: tuple[int, ...]
    variant: str = "differences"


@dataclass(frozen=True)
class ModelRef:
    """A model on a trajectory: source model + merged and dropped layers + what recovery left.

    `dropped` holds source layer indices, ascending. `merges` are done
    before all else, in order, on the source weights; the layers that they merge are
    among `dropped`. `weights`, left by full fine-tuning or a linear bridge, then take the
    place of the source's. `adapters` are applied last, in order. All name their tensors by
    source layer index, so that layers dropped later do not shift them.
    """

    REMOVED: ClassVar[Mapping[str, Any]] = {"emptied": ()}
    __pydantic_config__: ClassVar[Any] = {"extra": "ignore"}  # recorded plans still name it

    source: ModelSpec
    dropped: tuple[int, ...] = ()
    adapters: tuple[ArtifactRef, ...] = ()
    merges: tuple[Merge, ...] = ()
    weights: ArtifactRef | None = None

    def without(self, source_layers: tuple[int, ...]) -> "ModelRef":
        """Return the model with more source layers dropped."""
        return replace(self, dropped=tuple(sorted({*self.dropped, *source_layers})))

    def merged(self, merges: tuple[Merge, ...]) -> "ModelRef":
        """Return the model with these merges at the end of its own; drops nothing."""
        return replace(self, merges=(*self.merges, *merges))

    def adapted(self, adapter: ArtifactRef) -> "ModelRef":
        """Return the model with one more adapter at the end of its chain."""
        return replace(self, adapters=(*self.adapters, adapter))

    def retrained(self, weights: ArtifactRef) -> "ModelRef":
        """Return the same layers with these full weights, into which the adapter chain is merged."""
        return replace(self, adapters=(), weights=weights)

    def bridged(self, weights: ArtifactRef) -> "ModelRef":
        """Return the same layers with these weights under the adapter chain."""
        return replace(self, weights=weights)

    def kept(self, num_source_layers: int) -> tuple[int, ...]:
        """Return the source indices of the layers that remain: `map(l)` of IteRABRe, App. E."""
        gone = set(self.dropped)
        return tuple(i for i in range(num_source_layers) if i not in gone)


def common_base(models: Sequence[ModelRef]) -> ModelRef:
    """Return the least pruned model that all models are prunings of, or one of them.

    Raises ValueError if they differ in more than their dropped layers.
    """
    shared = set(models[0].dropped).intersection(*(model.dropped for model in models))
    base = replace(models[0], dropped=tuple(sorted(shared)))
    if any(replace(model, dropped=base.dropped) != base for model in models):
        raise ValueError("the models differ in more than their dropped layers")
    return base


@dataclass(frozen=True)
class ExportSpec:
    """Write `model` as an ordinary Hugging Face directory."""

    model: ModelRef


@dataclass(frozen=True)
class ExportResult:
    """The exported directory.

    `note` is for users of runtimes that compute the layers' kinds by themselves.
    """

    artifact: ArtifactRef
    num_layers: int
    num_parameters: int
    note: str | None = None
