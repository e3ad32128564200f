"""From a campaign file to trajectories and stages: everything is checked and decided before work starts."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from actors.contracts import (
    AdapterSpec,
    ArtifactRef,
    EvaluationSpec,
    GenerationSpec,
    LossSpec,
    MergeSpec,
    ModelInfo,
    ModelRef,
    ModelSpec,
    PerplexitySpec,
    RecoverySpec,
    ScoreSpec,
    TaskSpec,
    TextSpec,
    ThroughputSpec,
    digest,
)
from actors.data import chat_template, describe_text
from actors.evaluation import check_probes, check_tasks, suite_tasks
from actors.models import BLOCK, check_prunable, describe_model, load_tokenizer
from actors.models.merge import MERGES
from actors.recovery import check_data, check_recovery, find_objective
from actors.scoring import find_criterion
from orchestrator.config import CampaignConfig, MethodConfig, ModelConfig, TargetConfig, TextConfig
from orchestrator.errors import RequestError, unknown_name

NOT_IN_KEY = frozenset(
    {
        "micro_batch_size",
        "checkpoint_steps",
        "gradient_checkpointing",
        "deepspeed",
        "memory_budget_gb",
        "stream_weights",
    }
)
"""Fields of a spec that change how its result is computed, but not the result."""

PRECISION = ("bf16", "fp16", "optimizer")
"""The fields of a DeepSpeed JSON that do change the result."""


@dataclass(frozen=True)
class IterationPlan:
    """One round of score, prune, recover, evaluate."""

    index: int
    layers_to_drop: int
    layers_left: int
    is_target: bool


@dataclass(frozen=True)
class TrajectoryPlan:
    """One model taken by one method, with one seed, from full depth to the deepest target."""

    id: str
    campaign: str
    model_id: str
    model: ModelInfo
    method: MethodConfig
    seed: int
    iterations: tuple[IterationPlan, ...]
    evaluation: EvaluationSpec
    also_before_recovery: bool
    deepspeed: str
    fingerprints: Mapping[TextSpec | ModelSpec, str]
    tasks_fingerprint: str | None = None

    @property
    def dense(self) -> ModelRef:
        """The unpruned model."""
        return ModelRef(self.model.spec)

    @property
    def recovery_tokens(self) -> int:
        """Tokens of one recovery, at most; none where nothing is trained."""
        recovery = self.method.recovery
        return recovery.max_tokens if find_objective(recovery.objective).heals else 0

    def score_spec(self, model: ModelRef, layers_to_drop: int = 1) -> ScoreSpec:
        """What to ask of scoring for `model`, from which so many layers are to go."""
        scoring = self.method.scoring
        chooses_run = find_criterion(scoring.criterion).chooses_run
        return ScoreSpec(
            model=model,
            calibration=text_spec(scoring.calibration),
            criterion=scoring.criterion,
            reference=scoring.reference,
            pooling=scoring.pooling,
            max_sequences=scoring.max_sequences,
            sequence_length=scoring.sequence_length,
            seed=self.seed,
            # Left out where it does not matter, so that all portions share one stage.
            num_remove=layers_to_drop if chooses_run or scoring.confidence else 1,
            task=self._task(),
            merge=MergeSpec(**scoring.merge.model_dump()) if scoring.merge else None,
            memory_budget_gb=scoring.memory_budget_gb,
            stream_weights=scoring.stream_weights,
            confidence=scoring.confidence,
            granularity=self.granularity,
        )

    @property
    def granularity(self) -> str:
        """What is removed; depths and layers to drop count this."""
        return self.method.scoring.granularity

    @property
    def unit(self) -> str:
        """What is removed, in the plural, where a count goes before it."""
        return "layers" if self.granularity == BLOCK else f"{self.granularity}s"

    def _task(self) -> TaskSpec | None:
        task = self.method.scoring.task
        if task is None:
            return None
        evaluation = self.evaluation
        return TaskSpec(
            **task.model_dump(), include_path=evaluation.include_path, batch_size=evaluation.batch_size
        )

    @property
    def recovery_text(self) -> TextSpec:
        """The text that recovery is configured with; for generated responses, the prompts."""
        return text_spec(self.method.recovery.data)

    def generation_spec(self) -> GenerationSpec | None:
        """What the unpruned model has to generate before the first recovery; None if nothing."""
        recovery = self.method.recovery
        if find_objective(recovery.objective).trains_on != "responses":
            return None
        generation = recovery.generation
        # Nothing is drawn at temperature 0, so all seeds share one stage.
        seed = self.seed if generation.temperature else 0
        return GenerationSpec(self.model.spec, self.recovery_text, seed=seed, **generation.model_dump())

    def start_spec(self, model: ModelRef, data: TextSpec) -> RecoverySpec:
        """What is done to `model` before its recovery, where `recovery.start` says so.

        Only what it depends on is set, so that methods that differ in the rest share it.
        """
        recovery = self.method.recovery
        return RecoverySpec(
            model=model,
            data=data,
            objective=str(recovery.start),
            packing=recovery.packing,
            sequence_length=recovery.sequence_length,
            batch_size=recovery.batch_size,
            micro_batch_size=recovery.micro_batch_size,
            max_tokens=recovery.max_tokens,
            precision=recovery.precision,
            seed=self.seed,
        )

    def recovery_spec(self, model: ModelRef, data: TextSpec | None = None) -> RecoverySpec:
        """What to ask of recovery for the pruned `model`, on `data` if it is not the configured text."""
        spec = recovery_spec(model, self.method, self.seed, self.deepspeed)
        return spec if data is None else replace(spec, data=data)

    def evaluation_spec(self, model: ModelRef) -> EvaluationSpec:
        """What to ask of evaluation for `model`."""
        known = {f.name: getattr(self.evaluation, f.name) for f in fields(EvaluationSpec)}
        return EvaluationSpec(**{**known, "model": model})

    def key_inputs(self, spec: Any) -> Any:
        """All that a spec's result depends on, as JSON values: content by hash, never by place."""
        if isinstance(spec, ModelSpec):
            return self.model.fingerprint if spec == self.model.spec else self.fingerprints[spec]
        if isinstance(spec, TextSpec):
            return describe_text(spec).fingerprint if spec.generated else self.fingerprints[spec]
        if isinstance(spec, ArtifactRef):
            return spec.sha256
        if is_dataclass(spec):
            named = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in NOT_IN_KEY}
            if isinstance(spec, EvaluationSpec | TaskSpec):
                named["include_path"] = self.tasks_fingerprint
                del named["batch_size"]  # that of recovery does change its result
            if isinstance(spec, GenerationSpec):
                del named["batch_size"]
            if isinstance(spec, RecoverySpec):
                theirs = {k: v for k, v in json.loads(spec.deepspeed).items() if k in PRECISION}
                named["precision"] = [spec.precision, theirs]
            return {name: self.key_inputs(value) for name, value in named.items()}
        if isinstance(spec, (list, tuple)):
            return [self.key_inputs(value) for value in spec]
        return spec


@dataclass(frozen=True)
class CampaignPlan:
    """Everything a campaign will do."""

    name: str
    trajectories: tuple[TrajectoryPlan, ...]

    def needed_bytes(self) -> int:
        """Disk space of the exported models and the adapters, roughly."""
        return sum(_trajectory_bytes(t) for t in self.trajectories)

    def find(self, trajectory_id: str) -> TrajectoryPlan:
        """The trajectory of that id."""
        return next(t for t in self.trajectories if t.id == trajectory_id)


def build_plan(config: CampaignConfig) -> CampaignPlan:
    """Resolve models, texts, tasks and targets of a campaign.

    Reads configurations and hashes files; loads no weights and starts nothing.

    Raises:
        RequestError: a model, text, task, criterion, objective or target that
            cannot be had, with the place in the config.
    """
    evaluation = _evaluation(config)
    check_tasks(evaluation.tasks, evaluation.include_path)
    check_probes(evaluation.probes)
    for method in config.methods:
        _check_scoring(method, evaluation.include_path)
        check_data(method.recovery.objective, text_spec(method.recovery.data))
    infos = {model.id: describe_model(model_spec(model)) for model in config.models}
    deepspeed = _read_deepspeed(config.execution.training.deepspeed)
    fingerprints: dict[TextSpec | ModelSpec, str] = {
        text: describe_text(text).fingerprint for text in _texts(config, evaluation)
    }
    fingerprints |= {teacher: describe_model(teacher).fingerprint for teacher in _teachers(config)}
    trajectories = tuple(
        TrajectoryPlan(
            id=trajectory_id,
            campaign=config.name,
            model_id=model.id,
            model=infos[model.id],
            method=method,
            seed=seed,
            iterations=iterations,
            evaluation=evaluation,
            also_before_recovery=config.evaluation.also_before_recovery,
            deepspeed=deepspeed,
            fingerprints=fingerprints,
            tasks_fingerprint=_folder_fingerprint(evaluation.include_path),
        )
        for model in config.models
        for method in config.methods
        for seed in config.seeds
        for trajectory_id, iterations in _trajectories(config, model, method, seed, infos[model.id])
    )
    _check_prunable(trajectories)
    for trajectory in trajectories:
        _check_recovery(trajectory, config.execution.training.workers)
    return CampaignPlan(config.name, trajectories)


def _check_recovery(trajectory: TrajectoryPlan, workers: int) -> None:
    """Whether the objective is known, has the data that it trains on, and the model can write it."""
    method = trajectory.method
    try:
        check_recovery(trajectory.recovery_spec(trajectory.dense), workers)
        if method.recovery.start is not None:
            find_objective(method.recovery.start)
        if trajectory.recovery_text.conversations:
            chat_template(load_tokenizer(trajectory.model.spec), method.recovery.data.chat_template)
    except RequestError as error:
        raise RequestError(f"method {method.name!r}: {error}") from error


def _check_prunable(trajectories: Sequence[TrajectoryPlan]) -> None:
    """Whether each model can lose as much as its deepest target asks for, told from its config."""
    asked = {
        (t.model.spec, t.granularity, t.model.num_layers - t.iterations[-1].layers_left) for t in trajectories
    }
    for spec, granularity, count in asked:
        check_prunable(spec, granularity, count)


def _check_scoring(method: MethodConfig, include_path: str | None) -> None:
    """Whether the criterion is known and what it needs is there, and known."""
    scoring = method.scoring
    if wrong := _misfit(method):
        raise RequestError(f"method {method.name!r}: the criterion {scoring.criterion!r} {wrong}")
    if scoring.merge is not None and scoring.merge.variant not in MERGES:
        raise unknown_name("scoring.merge.variant", scoring.merge.variant, MERGES)
    if scoring.task is not None:
        check_tasks((scoring.task.name,), include_path)


def _misfit(method: MethodConfig) -> str | None:
    """What does not go with the method's criterion, in words that follow its name."""
    scoring = method.scoring
    criterion = find_criterion(scoring.criterion, scoring.pooling, scoring.granularity)
    if criterion.by_task and scoring.task is None:
        return "needs scoring.task"
    if scoring.task is not None and not criterion.by_task:
        return "has no use for scoring.task; leave it out"
    if scoring.merge is not None and not criterion.by_merge:
        return "has no use for scoring.merge; leave it out"
    if criterion.by_merge and method.schedule.mode != "direct":
        return "merges all layers at once; set schedule.mode: direct"
    if criterion.by_merge and find_objective(method.recovery.objective).heals:
        return "changes weights that recovery trains on; set recovery.objective: none"
    if scoring.granularity != BLOCK and find_objective(method.recovery.objective).heals:
        return f"empties {scoring.granularity}, which recovery would fill again; set recovery.objective: none"
    return None


def _trajectories(
    config: CampaignConfig, model: ModelConfig, method: MethodConfig, seed: int, info: ModelInfo
) -> Iterator[tuple[str, tuple[IterationPlan, ...]]]:
    """One trajectory through all targets, or, if all layers go at once, one for each target."""
    base = f"{model.id}--{method.name}--seed{seed}"
    depths = sorted({target_depth(target, info) for target in config.targets}, reverse=True)
    if method.schedule.mode == "direct":
        for depth in depths:
            yield f"{base}--{depth}L", (IterationPlan(1, info.num_layers - depth, depth, True),)
    else:
        yield base, iterative_schedule(info.num_layers, depths, method.schedule.layers_per_iteration)


def iterative_schedule(num_layers: int, depths: list[int], portion: int) -> tuple[IterationPlan, ...]:
    """Portions of layers from `num_layers` down to the smallest of `depths`, halting at each of them."""
    iterations: list[IterationPlan] = []
    left = num_layers
    for depth in depths:
        while left > depth:
            drop = min(portion, left - depth)
            left -= drop
            iterations.append(IterationPlan(len(iterations) + 1, drop, left, left == depth))
    return tuple(iterations)


def target_depth(target: TargetConfig, info: ModelInfo) -> int:
    """Layers that remain at a target.

    Raises:
        RequestError: not between 1 and one less than the model's depth.
    """
    if target.layers is not None:
        depth, asked = target.layers, f"layers: {target.layers}"
    else:
        share = target.fraction or 0.0
        # Halves round up: Python's round() would take 2.5 layers as 2.
        depth, asked = info.num_layers - math.floor(share * info.num_layers + 0.5), f"fraction: {share}"
    if not 1 <= depth < info.num_layers:
        raise RequestError(
            f"target {asked} leaves {depth} of the {info.num_layers} layers of {info.spec.path!r}; "
            f"it must leave between 1 and {info.num_layers - 1}"
        )
    return depth


def model_spec(model: ModelConfig) -> ModelSpec:
    """The model's spec, from its section of the campaign file."""
    return ModelSpec(model.path, model.dtype, model.revision, model.trust_remote_code)


def text_spec(text: TextConfig) -> TextSpec:
    """The text's spec, from its section of the campaign file."""
    return TextSpec(**text.model_dump())


def recovery_spec(model: ModelRef, method: MethodConfig, seed: int, deepspeed: str = "{}") -> RecoverySpec:
    """The recovery's spec, from its section of the campaign file."""
    recovery = method.recovery
    given = {
        name: value
        for name, value in recovery.model_dump().items()
        if name not in {"data", "loss", "adapter", "start", "generation", "teacher", "teacher_layers"}
    }
    adapter = recovery.adapter.model_dump()
    targets = adapter.pop("targets")
    return RecoverySpec(
        model=model,
        data=text_spec(recovery.data),
        loss=LossSpec(**recovery.loss.model_dump()),
        adapter=AdapterSpec(**adapter, targets=targets if isinstance(targets, str) else tuple(targets)),
        teacher=None if recovery.teacher is None else model_spec(recovery.teacher),
        teacher_layers=None if recovery.teacher_layers is None else tuple(recovery.teacher_layers),
        seed=seed,
        deepspeed=deepspeed,
        **given,
    )


def _evaluation(config: CampaignConfig) -> EvaluationSpec:
    evaluation = config.evaluation
    members = suite_tasks(evaluation.suites, evaluation.task_suffix)
    return EvaluationSpec(
        model=ModelRef(ModelSpec("")),
        perplexity=tuple(
            PerplexitySpec(p.name, text_spec(p.data), p.context, p.max_tokens) for p in evaluation.perplexity
        ),
        tasks=tuple(dict.fromkeys((*members, *evaluation.tasks))),
        suites=tuple(evaluation.suites),
        task_suffix=evaluation.task_suffix,
        include_path=evaluation.include_path,
        limit=evaluation.limit,
        num_fewshot=evaluation.num_fewshot,
        max_length=evaluation.max_length,
        batch_size=None if evaluation.batch_size == "auto" else evaluation.batch_size,
        seed=min(config.seeds),
        probes=tuple(evaluation.probes),
        max_new_tokens=evaluation.max_new_tokens,
        allow_code_execution=evaluation.allow_code_execution,
        throughput=ThroughputSpec(**evaluation.throughput.model_dump()) if evaluation.throughput else None,
    )


def _teachers(config: CampaignConfig) -> set[ModelSpec]:
    return {model_spec(m.recovery.teacher) for m in config.methods if m.recovery.teacher is not None}


def _texts(config: CampaignConfig, evaluation: EvaluationSpec) -> set[TextSpec]:
    texts = {perplexity.data for perplexity in evaluation.perplexity}
    for method in config.methods:
        texts.add(text_spec(method.scoring.calibration))
        texts.add(text_spec(method.recovery.data))
    return texts


def _folder_fingerprint(path: str | None) -> str | None:
    """Hash of the names and contents of all files under `path`."""
    if path is None:
        return None
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    return digest(
        [[file.relative_to(path).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
    )


def _read_deepspeed(path: str | None) -> str:
    if path is None:
        return "{}"
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(
            f"execution.training.deepspeed: {path!r} cannot be read: {error.strerror}"
        ) from error


def _trajectory_bytes(trajectory: TrajectoryPlan) -> int:
    bytes_per_parameter = 4 if trajectory.model.spec.dtype == "float32" else 2
    exports = sum(iteration.is_target for iteration in trajectory.iterations)
    weights = trajectory.model.num_parameters * bytes_per_parameter
    # Adapters and two training checkpoints with optimizer state are small beside full weights.
    return int(weights * (exports + 0.25))


def plan_summary(plan: CampaignPlan) -> list[dict[str, Any]]:
    """One JSON-able row a trajectory: what would run and how much arithmetic it is."""
    return [
        {
            "trajectory": t.id,
            "model": t.model.spec.path,
            "layers": t.model.num_layers,
            "targets": [i.layers_left for i in t.iterations if i.is_target],
            "iterations": len(t.iterations),
            "stages": num_stages(t),
            "recovery_tokens": t.recovery_tokens * len(t.iterations),
            "recovery_flops": recovery_flops(t),
            "recovery": {k: v for k, v in asdict(t.recovery_spec(t.dense)).items() if k == "objective"},
        }
        for t in plan.trajectories
    ]


def num_stages(trajectory: TrajectoryPlan) -> int:
    """Stages of a trajectory: the dense evaluation, generation, and those of every iteration and target."""
    recovery = trajectory.method.recovery
    each = 4 + trajectory.also_before_recovery + (recovery.start is not None)
    once = 1 + (trajectory.generation_spec() is not None)
    return once + sum(each + iteration.is_target for iteration in trajectory.iterations)


def recovery_flops(trajectory: TrajectoryPlan) -> float:
    """Floating-point operations of all recoveries, by the usual count.

    2 a parameter and token for the teacher's forward pass, and 2 + 4 for the
    student's forward and backward pass, of which a frozen base saves a third.
    """
    info, total = trajectory.model, 0.0
    for iteration in trajectory.iterations:
        student = info.num_parameters * iteration.layers_left / info.num_layers
        total += trajectory.recovery_tokens * (2 * info.num_parameters + 4 * student)
    return total
