"""Sections of the campaign file that say what is computed: models, methods, evaluation."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from orchestrator.config.paths import LocalPath

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,99}")
"""Methods made from search spaces are called name--field=value."""


def _safe_name(value: object) -> object:
    """Names become parts of paths, so they may hold nothing that leads out of a directory."""
    if isinstance(value, str) and not NAME.fullmatch(value):
        raise ValueError(f"{value!r} is no name: letters, digits, '.', '_' and '-' only, at most 60")
    return value


def _safe_method_name(value: object) -> object:
    if isinstance(value, str) and not METHOD_NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} is no name of a method: letters, digits, '.', '_', '-', '=' and '+' only, at most 100"
        )
    return value


Name = Annotated[str, BeforeValidator(_safe_name)]
MethodName = Annotated[str, BeforeValidator(_safe_method_name)]


class Section(BaseModel):
    """Every section refuses keys it does not know and never coerces strings to numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """A source model."""

    id: Name = Field(description="Short name used in results and paths.")
    path: Annotated[str, LocalPath()] = Field(
        min_length=1,
        description="Hub id, local directory, GGUF file, or package://PACKAGE/FILE.gguf.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Type of the weights in memory."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(False, description="Run code that the model's repository brings.")


class TextConfig(Section):
    """A body of text: exactly one of `builtin` and `path`."""

    builtin: str | None = Field(None, description="Name of a text that ships with the project.")
    path: Annotated[str | None, LocalPath()] = Field(
        None, description="Local .txt, .jsonl, .json, .csv or .parquet file, or hub data set."
    )
    config: str | None = Field(None, description="Configuration name of a hub data set.")
    split: str = Field("train", description="Split of a hub data set.")
    text_column: str = Field("text", description="Column that holds the text.")
    prompt_column: str | None = Field(None, description="Column with prompts, for training on answers.")
    input_column: str | None = Field(None, description="Column added to the prompt where it is not empty.")
    response_column: str | None = Field(None, description="Column with the answers to the prompts.")
    messages_column: str | None = Field(
        None, description="Column with whole conversations: lists of {role, content}."
    )
    chat_template: Annotated[str | None, LocalPath(names=("plain",))] = Field(
        None, description="How conversations are written: the tokenizer's way, plain, or a Jinja file."
    )
    streaming: bool = Field(False, description="Read records as they are needed; for large data.")

    @model_validator(mode="after")
    def _one_source(self) -> "TextConfig":
        if (self.builtin is None) == (self.path is None):
            raise ValueError("give exactly one of `builtin` and `path`")
        return self


class TaskConfig(Section):
    """The lm-eval task that decides for the criterion `task_metric`."""

    name: str = Field(min_length=1, description="Name of the task or group.")
    metric: str = Field("acc", description="Its metric, as evaluation names it: acc, acc_norm, …")
    higher_is_better: bool = Field(True, description="False for an error or a perplexity.")
    limit: int | None = Field(None, ge=1, description="Only the first so many documents.")
    num_fewshot: int | None = Field(
        None, ge=0, description="Examples in the prompt; the task's own if not given."
    )


class MergeConfig(Section):
    """How the criterion `laco` merges layers (LaCo, Algorithm 1)."""

    variant: str = Field("differences", description="differences (Eq. 1) or in_place (the published code).")
    threshold: float = Field(0.65, ge=-1, le=1, description="Least cosine to the unmerged model's output.")
    group: int = Field(4, ge=2, description="Layers that become one.")
    interval: int = Field(2, ge=1, description="Least distance of two layers that take others in.")
    lowest: int = Field(0, ge=0, description="Lowest layer that may take others in.")
    highest: int | None = Field(None, ge=1, description="Layers below this one are merged; all by default.")


class ScoringConfig(Section):
    """How the next layer to remove is chosen."""

    criterion: str = Field("hidden_cosine", description="A name in the table of criteria, or a plug-in's.")
    granularity: Literal["block", "attention", "mlp"] = Field(
        "block", description="What is removed: whole blocks, or the attention or the MLP of single blocks."
    )
    reference: Literal["source", "current"] = Field(
        "source", description="Model whose last hidden state is kept: the unpruned or the current one."
    )
    pooling: str = Field("flatten", description="flatten, token_mean or last_token.")
    calibration: TextConfig = TextConfig(builtin="iterabre-appendix-a")
    max_sequences: int | None = Field(None, ge=1, description="Use only the first so many sequences.")
    sequence_length: int = Field(512, ge=2, description="Longer sequences are cut to so many tokens.")
    task: TaskConfig | None = Field(None, description="What decides for task_metric; for no other criterion.")
    merge: MergeConfig | None = Field(None, description="How laco merges; for no other criterion.")
    memory_budget_gb: float | None = Field(
        None, gt=0, description="GiB that hidden states may take, beside the weights; changes no score."
    )
    stream_weights: bool = Field(
        False, description="Read layers from their files one at a time, for models larger than memory."
    )
    confidence: float | None = Field(
        None,
        gt=0.5,
        lt=1,
        description="Give up candidates that at this level will not be the next to go.",
    )


class ScheduleConfig(Section):
    """In what portions layers go."""

    mode: Literal["iterative", "direct"] = Field(
        "iterative", description="Score again after every portion, or remove all at once."
    )
    layers_per_iteration: int = Field(1, ge=1, description="Layers removed between two scorings.")
    recover_at: Literal["every_iteration", "targets"] = Field(
        "every_iteration", description="Recover after every portion, or only where a target is reached."
    )


class LossConfig(Section):
    """Weights of the loss terms; 0 switches a term off."""

    hidden: float = Field(1.0, ge=0, description="Mean square error of the outputs of the paired blocks.")
    attention: float = Field(
        1.0, ge=0, description="Mean square error of the attention matrices; needs eager attention."
    )
    logits: float = Field(1.0, ge=0, description="Distance of the logits.")
    logit_loss: Literal["mse", "forward_kl", "reverse_kl", "jsd", "cross_entropy"] = Field(
        "mse", description="What the distance of the logits is."
    )
    temperature: float = Field(1.0, gt=0, description="Divides the logits of all logit losses but mse.")
    auxiliary: float = Field(1.0, ge=0, description="Weight of Gromov's Eq. 8, in healing_aux.")


class AdapterConfig(Section):
    """What recovery trains."""

    kind: Literal["lora", "qlora", "full"] = Field(
        "lora", description="Low-rank, low-rank on NF4 base weights, or all weights."
    )
    rank: int = Field(32, ge=1, description="Rank of the low-rank update.")
    alpha: float | None = Field(None, gt=0, description="Scale; the rank if not given.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter.")
    targets: str | list[str] = Field(
        "all-linear", description="all-linear, ffn, attention, or a list of module names."
    )
    double_quantization: bool = Field(True, description="For qlora: quantise the scales of NF4, too.")


class GenerationConfig(Section):
    """How the unpruned model answers prompts, for the objective `sgr`."""

    max_prompts: int | None = Field(None, ge=1, description="Only the first so many prompts.")
    responses_per_prompt: int = Field(1, ge=1, description="Sampled responses a prompt.")
    max_new_tokens: int = Field(512, ge=1, description="Longest response.")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Share of probability that is sampled from.")
    batch_size: int = Field(8, ge=1, description="Prompts answered at a time.")
    engine: Literal["transformers", "vllm"] = Field("transformers", description="What generates.")

    @model_validator(mode="after")
    def _draws_differ(self) -> "GenerationConfig":
        if self.responses_per_prompt > 1 and self.temperature == 0:
            raise ValueError("several responses_per_prompt would all be the same at temperature 0; raise it")
        return self


class RecoveryConfig(Section):
    """How a pruned model is healed. The defaults are the paper's (IteRABRe §4)."""

    objective: str = Field("kd", description="A name in the table of objectives, or a plug-in's.")
    start: Literal["linear_bridge"] | None = Field(
        None, description="What is done in closed form before the objective is trained."
    )
    loss: LossConfig = LossConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: TextConfig = TextConfig(path="Salesforce/wikitext", config="wikitext-2-raw-v1", split="train")
    generation: GenerationConfig = GenerationConfig()
    teacher: ModelConfig | None = Field(None, description="Learn from this model, not from the unpruned one.")
    teacher_layers: list[int] | None = Field(
        None, description="With `teacher`: its layer for each layer of the student."
    )
    packing: Literal["concatenated", "documents"] = Field(
        "concatenated", description="Whether a token of a training block may see another document."
    )
    sequence_length: int = Field(512, ge=2, description="Tokens a training sequence.")
    batch_size: int = Field(32, ge=1, description="Sequences an optimizer step, over all workers.")
    micro_batch_size: int = Field(4, ge=1, description="Sequences a worker holds at a time.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    lr_schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="How the learning rate goes on after the warm-up."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear rise to the peak.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    max_tokens: int = Field(2_500_000, ge=1, description="Tokens seen in one recovery.")
    precision: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Type of the computation; the model's dtype if not given."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute blocks again in the backward pass rather than keep what they hold."
    )
    checkpoint_steps: int = Field(100, ge=1, description="Steps between two checkpoints.")


class MethodConfig(Section):
    """A way to compress: criterion × schedule × recovery.

    A value anywhere in it may be a search space, see `search`.
    """

    name: MethodName = Field(description="Short name used in results and paths.")
    scoring: ScoringConfig = ScoringConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    recovery: RecoveryConfig = RecoveryConfig()


class PerplexityConfig(Section):
    """Token perplexity of a text, concatenated and cut into windows of `context` tokens."""

    name: Name = Field(
        description="Metrics are NAME/token_perplexity, NAME/loss_nats and NAME/loss_over_log_vocab."
    )
    data: TextConfig
    context: int = Field(1024, ge=2, description="Tokens a window; windows do not overlap.")
    max_tokens: int | None = Field(None, ge=2, description="Only the text's first so many tokens.")


class ThroughputConfig(Section):
    """Speed and memory, measured beside the unpruned model on the same machine."""

    context: int = Field(512, ge=1, description="Tokens before the first generated one.")
    new_tokens: int = Field(64, ge=2, description="Tokens generated in one run.")
    batch_size: int = Field(1, ge=1, description="Sequences generated at a time.")
    repeats: int = Field(5, ge=1, description="Runs of each model, after a warm-up; medians are reported.")


NumFewshot = Annotated[int, Field(ge=0)]


class EvaluationConfig(Section):
    """What is measured, on the dense model and after every iteration."""

    perplexity: list[PerplexityConfig] = [
        PerplexityConfig(name="wikitext2", data=TextConfig(builtin="wikitext-2-raw-test"))
    ]
    suites: list[str] = Field([], description="Batteries of tasks, by name; see docs/evaluation.md.")
    tasks: list[str] = Field([], description="Further lm-eval tasks and groups, by name.")
    include_path: Annotated[str | None, LocalPath()] = Field(
        None, description="Directory with further lm-eval tasks."
    )
    task_suffix: str = Field(
        "", description="Added to the names of suite members, for variants of them in `include_path`."
    )
    limit: int | None = Field(None, ge=1, description="Only the first so many documents of a task.")
    num_fewshot: NumFewshot | dict[str, NumFewshot] | None = Field(
        None, description="Examples in the prompt, for all tasks or as TASK: NUMBER; else the task's own."
    )
    apply_chat_template: bool = Field(
        False, description="Put tasks as conversations by the model's chat template; task_metric's, too."
    )
    max_length: int | None = Field(
        None, ge=2, description="Longest input of a task in tokens; the model's own if not given."
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Longest requests at a time; `auto` is what memory allows. Changes no result."
    )
    probes: list[str] = Field(
        [], description="degeneration, arithmetic, code_failures, or a plug-in's; see docs/probes.md."
    )
    max_new_tokens: int = Field(128, ge=1, description="Longest text that a probe has the model write.")
    allow_code_execution: bool = Field(
        False, description="Run the code that the model writes, in a sandbox, against its tests."
    )
    throughput: ThroughputConfig | None = Field(None, description="Measure speed and memory, too.")
    at: Literal["every_iteration", "targets"] = Field(
        "every_iteration", description="Measure after every iteration, or only where a target is reached."
    )
    also_before_recovery: bool = Field(True, description="Measure the pruned model before it is healed, too.")
