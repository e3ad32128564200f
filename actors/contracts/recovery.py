"""Requests and results of recovery."""

from dataclasses import dataclass, field

from actors.contracts.artifacts import ArtifactRef
from actors.contracts.data import TextSpec
from actors.contracts.models import ModelRef, ModelSpec


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
