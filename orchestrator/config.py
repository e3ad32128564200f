"""The campaign file: pydantic models of the YAML, and how it is read.

Imports neither torch nor ray, so that a wrong file is refused in well under a second.
Whether the named models, data, criteria and tasks exist is `orchestrator.plan`'s matter.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from orchestrator.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


def _safe_name(value: object) -> object:
    """Names become parts of paths, so they may hold nothing that leads out of a directory."""
    if isinstance(value, str) and not NAME.fullmatch(value):
        raise ValueError(f"{value!r} is no name: letters, digits, '.', '_' and '-' only, at most 60")
    return value


Name = Annotated[str, BeforeValidator(_safe_name)]


class Section(BaseModel):
    """Every section refuses keys it does not know and never coerces strings to numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """A source model."""

    id: Name = Field(description="Short name used in results and paths.")
    path: str = Field(
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
    path: str | None = Field(
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
    chat_template: str | None = Field(
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

    criterion: str = Field("hidden_cosine", description="A name in the table of criteria.")
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
    layers_per_iteration: int = Field(1, ge=1, description="Layers removed between two recoveries.")


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

    objective: str = Field("kd", description="A name in the table of objectives.")
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
    """A way to compress: criterion × schedule × recovery."""

    name: Name = Field(description="Short name used in results and paths.")
    scoring: ScoringConfig = ScoringConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    recovery: RecoveryConfig = RecoveryConfig()


class TargetConfig(Section):
    """A depth to stop at: exactly one of `layers` and `fraction`."""

    layers: int | None = Field(None, description="Layers to keep.")
    fraction: float | None = Field(None, gt=0, lt=1, description="Share of the layers to remove.")

    @model_validator(mode="after")
    def _one_measure(self) -> "TargetConfig":
        if (self.layers is None) == (self.fraction is None):
            raise ValueError("give exactly one of `layers` and `fraction`")
        return self


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


class EvaluationConfig(Section):
    """What is measured, on the dense model and after every iteration."""

    perplexity: list[PerplexityConfig] = [
        PerplexityConfig(name="wikitext2", data=TextConfig(builtin="wikitext-2-raw-test"))
    ]
    suites: list[str] = Field([], description="Batteries of tasks, by name; see docs/evaluation.md.")
    tasks: list[str] = Field([], description="Further lm-eval tasks and groups, by name.")
    include_path: str | None = Field(None, description="Directory with further lm-eval tasks.")
    task_suffix: str = Field(
        "", description="Added to the names of suite members, for variants of them in `include_path`."
    )
    limit: int | None = Field(None, ge=1, description="Only the first so many documents of a task.")
    num_fewshot: int | None = Field(
        None, ge=0, description="Examples in the prompt; the task's own if not given."
    )
    max_length: int | None = Field(
        None, ge=2, description="Longest input of a task in tokens; the model's own if not given."
    )
    batch_size: int | Literal["auto"] = Field(
        "auto", description="Longest requests at a time; `auto` is what memory allows. Changes no result."
    )
    probes: list[str] = Field([], description="degeneration, arithmetic, code_failures; see docs/probes.md.")
    max_new_tokens: int = Field(128, ge=1, description="Longest text that a probe has the model write.")
    allow_code_execution: bool = Field(
        False, description="Run the code that the model writes, in a sandbox, against its tests."
    )
    throughput: ThroughputConfig | None = Field(None, description="Measure speed and memory, too.")
    also_before_recovery: bool = Field(True, description="Measure the pruned model before it is healed, too.")


class PoolConfig(Section):
    """Actors that share a stage's work, and what each holds."""

    actors: int = Field(2, ge=1, description="Actors that share the calibration sequences, or the prompts.")
    cpus: float = Field(1.0, gt=0, description="CPUs an actor.")
    gpus: float = Field(0.0, ge=0, description="GPUs an actor; may be a fraction.")


class WorkerConfig(Section):
    """Actors that share an evaluation's requests, and what each holds; an export holds as much as one."""

    actors: int = Field(1, ge=1, description="Actors that share the requests of the tasks.")
    cpus: float = Field(1.0, gt=0, description="CPUs an actor.")
    gpus: float = Field(0.0, ge=0, description="GPUs an actor; may be a fraction.")


class TrainingConfig(Section):
    """The workers of one recovery; they start together or not at all."""

    workers: int = Field(1, ge=1, description="Workers that share a batch.")
    cpus: float = Field(1.0, gt=0, description="CPUs a worker.")
    gpus: float = Field(0.0, ge=0, description="GPUs a worker.")
    deepspeed: str | None = Field(None, description="DeepSpeed JSON file, merged into ours.")
    max_failures: int = Field(3, ge=0, description="Lost workers before the recovery is given up.")


class ExecutionConfig(Section):
    """Where and how wide the work runs. Nothing here changes a result."""

    backend: Literal["ray", "local"] = Field("ray", description="On Ray, or all in this process.")
    scoring: PoolConfig = PoolConfig()
    generation: PoolConfig = PoolConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: WorkerConfig = WorkerConfig()
    overlap_evaluation: bool = Field(
        True,
        description="Evaluate while the next iteration is scored and trained, if there is room for both.",
    )
    max_concurrent_trajectories: int = Field(1, ge=1, description="Trajectories that run at a time.")
    start_timeout_s: float = Field(
        600.0, gt=0, description="Longest wait for the cluster to give what a stage asks for."
    )


class StorageConfig(Section):
    """Where runs are kept."""

    path: str = Field("runs", min_length=1, description="Local directory, NFS, s3:// or gs://.")


class CampaignConfig(Section):
    """One campaign: models × methods × seeds, with stops at the targets."""

    name: Name = Field(description="Name of the run; its directory under storage.path.")
    models: list[ModelConfig] = Field(min_length=1)
    methods: list[MethodConfig] = Field(min_length=1)
    targets: list[TargetConfig] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1, description="Every model and method runs once a seed.")
    evaluation: EvaluationConfig = EvaluationConfig()
    execution: ExecutionConfig = ExecutionConfig()
    storage: StorageConfig = StorageConfig()

    @field_validator("seeds")
    @classmethod
    def _seeds_in_range(cls, seeds: list[int]) -> list[int]:
        if any(not 0 <= seed < 2**31 for seed in seeds):
            raise ValueError("a seed lies between 0 and 2147483647")
        return seeds

    @model_validator(mode="after")
    def _unique_names(self) -> "CampaignConfig":
        for kind, names in (
            ("model id", [m.id for m in self.models]),
            ("method name", [m.name for m in self.methods]),
            ("seed", [str(s) for s in self.seeds]),
            ("evaluation.perplexity name", [p.name for p in self.evaluation.perplexity]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{kind} {sorted(twice)[0]!r} stands there twice")
        return self


class _Loader(yaml.SafeLoader):
    """YAML that also reads `1e-4` as the number it looks like, and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = [key for key, _ in node.value if keys.count(key.value) > 1]
        if twice:
            problem = f"the key {twice[1].value!r} stands there twice"
            raise yaml.constructor.ConstructorError(None, None, problem, twice[1].start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> CampaignConfig:
    """Read a campaign file and apply `--set a.b=c` overrides.

    Raises:
        ConfigError: no such file, no YAML, an unknown key or a wrong value; names the place.
    """
    file = Path(path)
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"config file {str(path)!r} must hold a mapping with the keys name, models, methods…"
        )
    for override in overrides or []:
        _apply(raw, override)
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], where: str) -> CampaignConfig:
    """Check an already read campaign file.

    Raises:
        ConfigError: every wrong field on a line of its own.
    """
    try:
        return CampaignConfig.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {_dotted(e['loc'])}: {_plain(e)}" for e in error.errors()]
        raise ConfigError("\n".join([f"{where} is not a valid campaign file:", *lines])) from error


def _plain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key; see docs/configuration.md for the known ones"
    message = error["msg"].removeprefix("Value error, ")
    return message if error["type"] == "missing" else f"{message} (got {error['input']!r})"


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "(top level)"


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one field, e.g. `methods.0.recovery.learning_rate=1e-4`; the value is YAML."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {override!r}: write it as path.to.field=value")
    *parents, last = path.split(".")
    place: Any = raw
    for part in parents:
        place = _step_into(place, part, override)
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: {text!r} is no YAML value") from error
    if isinstance(place, list):
        place[_position(place, last, override)] = value
    else:
        place[last] = value


def _step_into(place: Any, part: str, override: str) -> Any:
    if isinstance(place, list):
        position = _position(place, part, override)
        inner = place[position]
    else:
        inner = place.setdefault(part, {})
    if not isinstance(inner, (dict, list)):
        raise ConfigError(f"--set {override!r}: {part!r} holds a value, not a section")
    return inner


def _position(place: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(place):
        raise ConfigError(f"--set {override!r}: {part!r} is no position in a list of {len(place)}, from 0")
    return int(part)
