"""Requests and results of recovery."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from actors.contracts import names
from actors.contracts.artifacts import ArtifactRef
from actors.contracts.data import NO_ROWS, RowCounts, TextSettings, TextSpec
from actors.contracts.models import Dtype, ModelRef, ModelSpec
from actors.contracts.settings import AddedLater, Doc, InKeyWhereUsed, Known, NotInKey, Settings


@dataclass(frozen=True)
class BelowCut(Settings):
    """Adapters from `below_cut` blocks below the first removed block on."""

    below_cut: Annotated[int, Ge(0), Doc("Blocks below the first removed one that are trained, too.")]


@dataclass(frozen=True)
class AdapterSpec(Settings):
    """What recovery trains."""

    kind: Annotated[
        Literal["lora", "qlora", "full"], Doc("Low-rank, low-rank on NF4 base weights, or all weights.")
    ] = "lora"
    rank: Annotated[int, Ge(1), Doc("Rank of the low-rank update.")] = 32
    alpha: Annotated[float | None, Gt(0), Doc("Scale; the rank if not given.")] = None
    dropout: Annotated[float, Ge(0), Lt(1), Doc("Dropout before the adapter.")] = 0.0
    targets: Annotated[
        str | tuple[str, ...], Doc("all-linear, ffn, attention, or a list of module names.")
    ] = "all-linear"
    double_quantization: Annotated[bool, Doc("For qlora: quantise the scales of NF4, too.")] = True
    layers: Annotated[
        Literal["all", "after_cut"] | BelowCut,
        AddedLater("all"),
        Doc(
            "Blocks with an adapter: all, those after the first removed block, or with {below_cut: k} k more "
            "below it. Blocks before them run once for teacher and student, without gradient."
        ),
    ] = "all"
    rslora: Annotated[
        bool, AddedLater(False), Doc("Scale by alpha / √rank in place of alpha / rank (arXiv 2312.03732).")
    ] = False
    dora: Annotated[
        bool,
        AddedLater(False),
        Doc("For lora: train the length of each weight row apart (arXiv 2402.09353); leaves full weights."),
    ] = False

    @property
    def leaves_weights(self) -> bool:
        """True if what is trained is kept as full weights rather than as an adapter."""
        return self.kind == "full" or self.dora


@dataclass(frozen=True)
class LossSpec(Settings):
    """Weights of the loss terms; 0 switches a term off.

    `hidden`, `attention` and `logits` are those of distillation (IteRABRe §3.2), which `next_token` joins.
    """

    hidden: Annotated[float, Ge(0), Doc("Mean square error of the outputs of the paired blocks.")] = 1.0
    attention: Annotated[
        float, Ge(0), Doc("Mean square error of the attention matrices; needs eager attention.")
    ] = 1.0
    logits: Annotated[float, Ge(0), Doc("Distance of the logits.")] = 1.0
    logit_loss: Annotated[
        Literal["mse", "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "cross_entropy"],
        Doc("What the distance of the logits is."),
    ] = "mse"
    temperature: Annotated[float, Gt(0), Doc("Divides the logits of all logit losses but mse.")] = 1.0
    auxiliary: Annotated[float, Ge(0), Doc("Weight of Gromov's Eq. 8, in healing_aux.")] = 1.0
    next_token: Annotated[
        float, Ge(0), AddedLater(0.0), Doc("Next token's cross-entropy, beside the distillation of kd.")
    ] = 0.0
    skew: Annotated[
        float,
        Gt(0),
        Lt(1),
        AddedLater(0.1),
        Doc("Share of the other model in what skew_kl and skew_reverse_kl compare with."),
    ] = 0.1
    hidden_layers: Annotated[
        Literal["all", "last"],
        AddedLater("all"),
        Doc("Whether `hidden` compares every pair of blocks, or the states after the final norm alone."),
    ] = "all"
    hidden_scale: Annotated[
        Literal["raw", "normalised"],
        AddedLater("raw"),
        Doc("normalised divides each token's `hidden` error by the mean square of the teacher's state."),
    ] = "raw"
    last_hidden_state: Annotated[
        Literal["after_norm", "before_norm"],
        InKeyWhereUsed(),
        Doc(
            "Where `hidden` takes the state of the last block: after the final norm, as hidden_states[-1] of "
            "transformers, or before it."
        ),
    ] = "after_norm"


@dataclass(frozen=True, kw_only=True)
class RecoverySettings(Settings):
    """How a pruned model is healed. The defaults are the paper's (IteRABRe §4)."""

    objective: Annotated[
        str, Known(names.OBJECTIVES), Doc("A name in the table of objectives, or a plug-in's.")
    ] = "kd"
    loss: LossSpec = LossSpec()
    adapter: AdapterSpec = AdapterSpec()
    data: TextSettings = TextSettings(path="Salesforce/wikitext", config="wikitext-2-raw-v1", split="train")
    teacher_layers: Annotated[
        tuple[int, ...] | None, Doc("With `teacher`: its layer for each layer of the student.")
    ] = None
    packing: Annotated[
        Literal["concatenated", "documents"],
        Doc("Whether a token of a training block may see another document."),
    ] = "concatenated"
    special_tokens: Annotated[
        bool,
        AddedLater(False),
        Doc("Put the tokenizer's own special tokens (BOS, EOS) around each document of running text."),
    ] = False
    sequence_length: Annotated[int, Ge(2), Doc("Tokens a training sequence.")] = 512
    batch_size: Annotated[int, Ge(1), Doc("Sequences an optimizer step, over all workers.")] = 32
    micro_batch_size: Annotated[int, Ge(1), Doc("Sequences a worker holds at a time."), NotInKey()] = 4
    learning_rate: Annotated[float, Gt(0), Doc("Peak learning rate of AdamW.")] = 1e-4
    lr_schedule: Annotated[
        Literal["linear", "cosine", "constant"], Doc("How the learning rate goes on after the warm-up.")
    ] = "linear"
    warmup_steps: Annotated[int, Ge(0), Doc("Steps of linear rise to the peak.")] = 0
    weight_decay: Annotated[float, Ge(0), Doc("AdamW's decoupled weight decay.")] = 0.0
    max_grad_norm: Annotated[float, Gt(0), Doc("Gradients are clipped to this norm.")] = 1.0
    group_by_length: Annotated[
        bool,
        AddedLater(False),
        Doc("Make batches of sequences of like length, so that little is padding; for conversations."),
    ] = False
    max_tokens: Annotated[int, Ge(1), Doc("Tokens seen in one recovery.")] = 2_500_000
    teacher_cache: Annotated[
        Literal["auto", "off", "hidden", "topk"],
        Doc(
            "Run the teacher once over the data and keep its last hidden states, or its likeliest tokens "
            "(`topk`, another result); `auto` keeps the former where that takes less time."
        ),
        NotInKey(),
    ] = "auto"
    teacher_cache_dtype: Annotated[
        Dtype | None, Doc("Type of the kept hidden states; that of the computation if not given."), NotInKey()
    ] = None
    teacher_cache_blocks: Annotated[
        tuple[int, ...],
        Doc("Blocks of the unpruned model whose input is kept, too, so that recovery can begin there."),
        NotInKey(),
    ] = ()
    teacher_cache_gb: Annotated[float, Gt(0), Doc("GB that they may take, at most."), NotInKey()] = 100.0
    teacher_top_k: Annotated[
        int, Ge(1), Doc("Tokens that `topk` keeps of each distribution."), NotInKey()
    ] = 64
    epochs: Annotated[
        int | None,
        Ge(1),
        AddedLater(None),
        Doc("Passes over the data at most; training ends with them or with max_tokens, whichever is first."),
    ] = None
    precision: Annotated[Dtype | None, Doc("Type of the computation; the model's dtype if not given.")] = None
    gradient_checkpointing: Annotated[
        bool | Literal["auto"],
        Doc(
            "Compute blocks again in the backward pass rather than keep what they hold; auto: as many as it "
            "takes for one sequence to fit."
        ),
        NotInKey(),
    ] = False
    attention_implementation: Annotated[
        str | None,
        Doc("Transformers' name, such as sdpa or flash_attention_2; the model's own choice if not given."),
        NotInKey(),
    ] = None
    checkpoint_steps: Annotated[int, Ge(1), Doc("Steps between two checkpoints."), NotInKey()] = 100


CLOSED_FORM_OBJECTIVES = frozenset({"linear_bridge"})
"""Objectives that solve and train nothing, as their rows say: here for processes without torch."""


@dataclass(frozen=True, kw_only=True)
class RecoverySpec(RecoverySettings):
    """Heal `model` (the student), by default by training adapters against its source model.

    The result does not depend on how many workers share a batch. `teacher` names another
    model than the source to learn from; `teacher_layers[l]` is then the teacher's
    layer that the student's l-th is compared with, where hidden states or
    attention are compared at all.
    """

    model: ModelRef
    data: TextSpec
    teacher: ModelSpec | None = None
    seed: int = 0
    deepspeed: Annotated[str, NotInKey()] = "{}"
    """The user's DeepSpeed configuration, as JSON text."""
    teacher_states: Annotated[ArtifactRef | None, NotInKey()] = None
    """What a stage `teach` stored of the teacher, which then does not run."""

    def with_recovery(self, artifact: ArtifactRef | None) -> ModelRef:
        """Return the model that this recovery leaves, `artifact` being what it trained."""
        if artifact is None:
            return self.model
        if self.objective == "linear_bridge":
            return self.model.bridged(artifact)
        trained = self.model.retrained if self.adapter.leaves_weights else self.model.adapted
        return trained(artifact)

    @property
    def takes_last_state_after_norm(self) -> bool:
        """True if `loss.last_hidden_state` has another loss computed than before there was that field."""
        loss = self.loss
        compares_blocks = self.objective == "kd" and loss.hidden > 0 and loss.hidden_layers == "all"
        return compares_blocks and loss.last_hidden_state == "after_norm"

    @property
    def first_trainable(self) -> int:
        """The position in the student of its first block that is trained, 0 if all are.

        Below the first removed block, positions in the student and in its source are the same.
        """
        layers = self.adapter.layers
        if self.adapter.kind == "full" or layers == "all" or not self.model.dropped:
            return 0
        below = layers.below_cut if isinstance(layers, BelowCut) else 0
        return max(0, min(self.model.dropped) - below)


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of recovery. Losses are means over the whole batch.

    `tokens` are the tokens of the step over all workers, `peak_memory_bytes` the
    most that any worker has held so far (on its GPU if it has one). With float16,
    `overflows` counts how often the step was computed again at a smaller loss
    scale before `loss_scale` suited.
    """

    step: int
    tokens: int
    loss: float
    terms: tuple[tuple[str, float], ...]
    learning_rate: float
    grad_norm: float
    seconds: float
    peak_memory_bytes: int = 0
    loss_scale: float = 1.0
    overflows: int = 0


@dataclass(frozen=True)
class RecoveryResult:
    """What recovery measured, and what it trained: an adapter or full weights (None for `none`).

    `flops_per_token` are the operations of matrix products, forward and backward, and
    `peak_flops` those that all workers' devices could do in a second; 0 where that is not known.
    """

    artifact: ArtifactRef | None
    steps: tuple[StepRecord, ...]
    tokens: int
    trainable_parameters: int
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    rows: RowCounts = NO_ROWS
