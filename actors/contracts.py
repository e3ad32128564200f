"""Frozen specs and results that cross between rooms, processes and machines.

Standard library only, so that every process can import it in no time.
`*Spec` is requested, `*Result` is measured, `*Ref` points at an artifact.
Weights never travel inside these objects; they are referred to by URI and hash.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

BLOCK = "block"
"""The granularity at which whole blocks are removed; their layers are what depths count."""

Progress = Callable[[int, int, str], None]
"""Called with (units done, units in all, note); must be cheap and never raise."""


def no_progress(done: int, total: int, note: str = "") -> None:
    """The `Progress` that tells nobody."""


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class FileRef:
    """One file of an artifact: name relative to the artifact, size and SHA-256."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ArtifactRef:
    """A directory of files at `uri` (local path or s3://, gs://), with their hashes."""

    uri: str
    files: tuple[FileRef, ...]

    @property
    def sha256(self) -> str:
        """Hash of the content; where it lies does not matter."""
        return digest([[f.name, f.size_bytes, f.sha256] for f in self.files])


@dataclass(frozen=True)
class ModelSpec:
    """Where a source model comes from and how it is loaded.

    `path` is a hub id, a local directory, a GGUF file, or
    `package://PACKAGE/FILE.gguf` for a file inside an installed Python package.
    """

    path: str
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
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

    `dropped` holds source layer indices, ascending. `emptied` names sub-blocks that
    add nothing any more, by source layer index and kind, ascending. `merges` are done
    before all else, in order, on the source weights; the layers that they merge are
    among `dropped`. `weights`, left by full fine-tuning or a linear bridge, then take the
    place of the source's. `adapters` are applied last, in order. All name their tensors by
    source layer index, so that layers dropped later do not shift them.
    """

    source: ModelSpec
    dropped: tuple[int, ...] = ()
    adapters: tuple[ArtifactRef, ...] = ()
    merges: tuple[Merge, ...] = ()
    weights: ArtifactRef | None = None
    emptied: tuple[tuple[int, str], ...] = ()

    def pruned(self, granularity: str, source_layers: tuple[int, ...]) -> "ModelRef":
        """The same model with whole blocks dropped (`block`), or their attention or MLP emptied."""
        if granularity == BLOCK:
            return self.without(source_layers)
        emptied = {*self.emptied, *((layer, granularity) for layer in source_layers)}
        return replace(self, emptied=tuple(sorted(emptied)))

    def candidates(self, granularity: str, num_source_layers: int) -> tuple[int, ...]:
        """Source indices of the layers that have something of this granularity to lose."""
        return tuple(i for i in self.kept(num_source_layers) if (i, granularity) not in self.emptied)

    def without(self, source_layers: tuple[int, ...]) -> "ModelRef":
        """The same model with more source layers dropped."""
        return replace(self, dropped=tuple(sorted({*self.dropped, *source_layers})))

    def merged(self, merges: tuple[Merge, ...]) -> "ModelRef":
        """The same model with these merges at the end of its own; drops nothing."""
        return replace(self, merges=(*self.merges, *merges))

    def adapted(self, adapter: ArtifactRef) -> "ModelRef":
        """The same model with one more adapter at the end of its chain."""
        return replace(self, adapters=(*self.adapters, adapter))

    def retrained(self, weights: ArtifactRef) -> "ModelRef":
        """The same layers with these full weights, into which the adapter chain has gone."""
        return replace(self, adapters=(), weights=weights)

    def bridged(self, weights: ArtifactRef) -> "ModelRef":
        """The same layers with these weights under the adapter chain."""
        return replace(self, weights=weights)

    def kept(self, num_source_layers: int) -> tuple[int, ...]:
        """Source indices of the layers that remain: `map(l)` of DESIGN §6."""
        gone = set(self.dropped)
        return tuple(i for i in range(num_source_layers) if i not in gone)


@dataclass(frozen=True)
class TextSpec:
    """A body of text: a built-in name, a file, a hub data set, or responses that a stage generated.

    For objectives that train on answers, a record is a conversation: either
    `messages_column` (a list of {role, content}), or `prompt_column`, with
    `input_column` added to it where that is not empty, and `response_column`.
    `chat_template` is the tokenizer's own if None, `plain`, or a Jinja file.
    With `streaming`, records are read as they are needed and never all held.

    A plan adds what it found: the text's `fingerprint`, so that another text in its
    place is refused where it is read, and the content `template` of a Jinja file.
    """

    builtin: str | None = None
    path: str | None = None
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    prompt_column: str | None = None
    input_column: str | None = None
    response_column: str | None = None
    messages_column: str | None = None
    chat_template: str | None = None
    streaming: bool = False
    generated: ArtifactRef | None = None
    fingerprint: str | None = field(default=None, compare=False)
    template: str | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The text in messages: its built-in name, its path as given, or where responses lie."""
        return self.builtin or self.path or (self.generated.uri if self.generated else "")

    @property
    def conversations(self) -> bool:
        """Whether records are conversations, or prompts of such, rather than running text."""
        return any((self.prompt_column, self.messages_column, self.generated))


@dataclass(frozen=True)
class TextInfo:
    """What is known of a text before it is used; `spec` holds what was found (see `TextSpec`)."""

    spec: TextSpec
    fingerprint: str
    num_rows: int | None


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
class AdapterSpec:
    """Which weights recovery may change: `lora`, `qlora` (on NF4 base weights) or `full`.

    `alpha` defaults to the rank.
    """

    kind: str = "lora"
    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    double_quantization: bool = True


@dataclass(frozen=True)
class LossSpec:
    """Weights of the loss terms; 0 switches a term off.

    `hidden`, `attention` and `logits` are the distillation's (IteRABRe §3.2);
    `logit_loss` is one of `mse`, `forward_kl`, `reverse_kl`, `jsd`,
    `cross_entropy`, and `temperature` divides the logits of all but `mse`.
    `auxiliary` weighs Gromov's Eq. 8 in `healing_aux`.
    """

    hidden: float = 1.0
    attention: float = 1.0
    logits: float = 1.0
    logit_loss: str = "mse"
    temperature: float = 1.0
    auxiliary: float = 1.0


@dataclass(frozen=True)
class RecoverySpec:
    """Heal `model` (the student), by default by training adapters against its source model.

    `batch_size` counts sequences of one optimizer step over all workers, so the
    result does not depend on how many workers share it. `teacher` names another
    model than the source to learn from; `teacher_layers[l]` is then the teacher's
    layer that the student's l-th is compared with, where hidden states or
    attention are compared at all. `packing` is `concatenated` (blocks run across
    documents) or `documents` (no token sees another document). `precision` is the
    type of the computation, that of the source's weights if None.
    """

    model: ModelRef
    data: TextSpec
    objective: str = "kd"
    loss: LossSpec = field(default_factory=LossSpec)
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    teacher: ModelSpec | None = None
    teacher_layers: tuple[int, ...] | None = None
    packing: str = "concatenated"
    sequence_length: int = 512
    batch_size: int = 32
    micro_batch_size: int = 4
    learning_rate: float = 1e-4
    lr_schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_tokens: int = 2_500_000
    precision: str | None = None
    gradient_checkpointing: bool = False
    checkpoint_steps: int = 100
    seed: int = 0
    deepspeed: str = "{}"
    """The user's DeepSpeed configuration, as JSON text."""

    def healed(self, artifact: ArtifactRef | None) -> ModelRef:
        """The model that this recovery leaves, `artifact` being what it trained."""
        if artifact is None:
            return self.model
        if self.objective == "linear_bridge":
            return self.model.bridged(artifact)
        return self.model.retrained(artifact) if self.adapter.kind == "full" else self.model.adapted(artifact)


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
    """What recovery measured, and what it trained: an adapter or full weights (None for `none`)."""

    artifact: ArtifactRef | None
    steps: tuple[StepRecord, ...]
    tokens: int
    trainable_parameters: int


@dataclass(frozen=True)
class GenerationSpec:
    """Have the unpruned `model` answer prompts (self-generated responses, *Limits* §4).

    `prompts` is read for its prompts only. `temperature` 0 is greedy decoding.
    `engine` is `transformers` or `vllm`. `batch_size` changes no response but by rounding.
    """

    model: ModelSpec
    prompts: TextSpec
    max_prompts: int | None = None
    responses_per_prompt: int = 1
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 8
    seed: int = 0
    engine: str = "transformers"

    def responses(self, artifact: ArtifactRef) -> TextSpec:
        """The responses as a text to train on, written by the template of the prompts."""
        prompts = self.prompts
        return TextSpec(generated=artifact, chat_template=prompts.chat_template, template=prompts.template)


@dataclass(frozen=True)
class GenerationResult:
    """Responses as an artifact of JSONL files: a line a response, in the order of the prompts.

    A line has `prompt` (its messages), `response`, `finished` (it ended by itself)
    and `tokens` (of the response). `num_tokens` counts those of all responses.
    """

    artifact: ArtifactRef
    num_prompts: int
    num_responses: int
    num_tokens: int
    num_finished: int


@dataclass(frozen=True)
class PerplexitySpec:
    """Token perplexity of a text, concatenated and cut into windows of `context` tokens."""

    name: str
    data: TextSpec
    context: int = 1024
    max_tokens: int | None = None


@dataclass(frozen=True)
class ThroughputSpec:
    """Time prefill of `context` tokens and decoding of `new_tokens` after them; medians of `repeats`."""

    context: int = 512
    new_tokens: int = 64
    batch_size: int = 1
    repeats: int = 5


FewShot = int | tuple[tuple[str, int], ...] | None
"""Examples in a prompt: a number for all tasks, or one for each task or group named; else the task's own."""


@dataclass(frozen=True)
class EvaluationSpec:
    """Measure `model` on perplexity texts, lm-eval tasks, probes and its speed.

    `tasks` holds the members of `suites`, too, whose names end in `task_suffix`;
    the suites themselves only give their means. `max_length` is the longest
    input in tokens, the model's own if None. `batch_size` counts the longest
    requests evaluated at a time, None what memory allows; it changes no result.
    With `apply_chat_template`, tasks are put as conversations, their examples as turns.

    `probes` are names in `PROBES`; `limit` holds for them as for tasks, and
    `max_new_tokens` bounds the texts that they have the model write. Code in them is
    run only with `allow_code_execution`. `throughput` is measured beside the
    unpruned model. `tasks_fingerprint` is that of the folder `include_path` when the
    campaign was planned; another folder in its place is refused.
    """

    model: ModelRef
    perplexity: tuple[PerplexitySpec, ...] = ()
    tasks: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    task_suffix: str = ""
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: FewShot = None
    apply_chat_template: bool = False
    max_length: int | None = None
    batch_size: int | None = None
    seed: int = 0
    probes: tuple[str, ...] = ()
    max_new_tokens: int = 128
    allow_code_execution: bool = False
    throughput: ThroughputSpec | None = None
    tasks_fingerprint: str | None = None


@dataclass(frozen=True)
class Metric:
    """One measured number. `name` is `subject/measure`, e.g. `blimp_sample/acc`."""

    name: str
    value: float
    unit: str = ""
    stderr: float | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of one model, with the versions that produced them."""

    metrics: tuple[Metric, ...]
    num_parameters: int
    versions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ExportSpec:
    """Write `model` as an ordinary Hugging Face directory.

    `card` is the README.md text and `provenance` the `iterabre.json` content.
    """

    model: ModelRef
    card: str
    provenance: str


@dataclass(frozen=True)
class ExportResult:
    """The exported directory.

    `num_emptied_parameters` of its parameters are stored and add nothing.
    """

    artifact: ArtifactRef
    num_layers: int
    num_parameters: int
    num_emptied_parameters: int = 0


def to_json(value: Any) -> dict[str, Any]:
    """A contract object as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(asdict(value)))
