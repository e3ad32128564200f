"""From a campaign file to trajectories and stages: everything is checked and decided before work starts."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from actors.contracts import (
    ArtifactRef,
    EvaluationSpec,
    GenerationSpec,
    MergeSpec,
    ModelInfo,
    ModelRef,
    ModelSpec,
    RecoverySpec,
    ScoreSpec,
    TaskSpec,
    TextSpec,
    digest,
)
from actors.data import chat_template, describe_text
from actors.data.text import builtin_file
from actors.evaluation import check_probes, check_tasks
from actors.models import BLOCK, check_prunable, describe_model, load_tokenizer
from actors.models.merge import MERGES
from actors.plugins import releases
from actors.recovery import check_data, check_recovery, find_objective
from actors.scoring import find_criterion
from orchestrator.config import CampaignConfig, MethodConfig, SearchConfig
from orchestrator.errors import RequestError, unknown_name
from orchestrator.grid import check_exclusions, trajectories_of
from orchestrator.schedule import IterationPlan
from orchestrator.specs import evaluation_spec, model_spec, recovery_spec, text_spec

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

ADDED_LATER: Mapping[str, Any] = {}
"""Fields that a spec got after results were stored, each with the value that means what was done
before: at that value they are not in the key, so that older results are found."""

PRECISION = ("bf16", "fp16", "optimizer")
"""The fields of a DeepSpeed JSON that do change the result."""


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
        return self.method.recovery.max_tokens if _heals(self.method) else 0

    def recovers(self, iteration: IterationPlan) -> bool:
        """Whether the pruned model of the iteration is healed."""
        return iteration.recovers and _heals(self.method)

    def score_spec(self, model: ModelRef, layers_to_drop: int = 1) -> ScoreSpec:
        """What to ask of scoring for `model`, from which so many layers are to go."""
        scoring = self.method.scoring
        criterion = find_criterion(scoring.criterion)
        return ScoreSpec(
            model=model,
            calibration=text_spec(scoring.calibration),
            criterion=scoring.criterion,
            reference=scoring.reference,
            pooling=scoring.pooling,
            max_sequences=scoring.max_sequences,
            sequence_length=scoring.sequence_length,
            # Seed and portion are left out where they do not matter, so that all share one stage.
            seed=self.seed if criterion.seeded or scoring.confidence else 0,
            num_remove=layers_to_drop if criterion.chooses_run or scoring.confidence else 1,
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
            for name in ADDED_LATER.keys() & named.keys():
                if named[name] == ADDED_LATER[name]:
                    del named[name]
            if isinstance(spec, EvaluationSpec | TaskSpec):
                named["include_path"] = self.tasks_fingerprint
                del named["batch_size"]  # that of recovery does change its result
            if isinstance(spec, GenerationSpec):
                del named["batch_size"]
            if isinstance(spec, RecoverySpec):
                theirs = {k: v for k, v in json.loads(spec.deepspeed).items() if k in PRECISION}
                named["precision"] = [spec.precision, theirs]
            if plugged := releases(spec):
                named["plugins"] = plugged
            return {name: self.key_inputs(value) for name, value in named.items()}
        if isinstance(spec, (list, tuple)):
            return [self.key_inputs(value) for value in spec]
        return spec


@dataclass(frozen=True)
class TextSize:
    """How long a text is, where that is known before it is read into tokens."""

    num_rows: int | None
    num_bytes: int | None


@dataclass(frozen=True)
class CampaignPlan:
    """Everything a campaign will do."""

    name: str
    trajectories: tuple[TrajectoryPlan, ...]
    text_sizes: Mapping[TextSpec, TextSize] = field(default_factory=dict)

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
    evaluations = {
        model.id: evaluation_spec(config.evaluation_for(model), min(config.seeds)) for model in config.models
    }
    for evaluation in evaluations.values():
        check_tasks(evaluation.tasks, evaluation.include_path)
        check_probes(evaluation.probes)
    grid = [(model, config.method_for(model, method)) for model in config.models for method in config.methods]
    for model, method in grid:
        _check_scoring(method, evaluations[model.id].include_path)
        check_data(method.recovery.objective, text_spec(method.recovery.data))
    infos = {model.id: describe_model(model_spec(model)) for model in config.models}
    deepspeed = _read_deepspeed(config.execution.training.deepspeed)
    methods = [method for _, method in grid]
    texts = {text: describe_text(text) for text in _texts(methods, evaluations.values())}
    fingerprints: dict[TextSpec | ModelSpec, str] = {spec: text.fingerprint for spec, text in texts.items()}
    fingerprints |= {teacher: describe_model(teacher).fingerprint for teacher in _teachers(methods)}
    trajectories = tuple(
        TrajectoryPlan(
            id=trajectory_id,
            campaign=config.name,
            model_id=model.id,
            model=infos[model.id],
            method=method,
            seed=seed,
            iterations=iterations,
            evaluation=evaluations[model.id],
            also_before_recovery=config.evaluation_for(model).also_before_recovery,
            deepspeed=deepspeed,
            fingerprints=fingerprints,
            tasks_fingerprint=_folder_fingerprint(evaluations[model.id].include_path),
        )
        for model, method in grid
        for seed in config.seeds
        for trajectory_id, iterations in trajectories_of(config, model, method, seed, infos[model.id])
    )
    check_exclusions(config)
    if not trajectories:
        raise RequestError("`exclude` leaves nothing to run; take an entry out")
    _check_prunable(trajectories)
    for trajectory in trajectories:
        _check_recovery(trajectory, config.execution.training.workers)
    _check_search(config.search, evaluations.values())
    sizes = {spec: TextSize(text.num_rows, _text_bytes(spec)) for spec, text in texts.items()}
    return CampaignPlan(config.name, trajectories, sizes)


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
    if criterion.by_merge and _heals(method):
        return "changes weights that recovery trains on; set recovery.objective: none"
    if scoring.granularity != BLOCK and _heals(method):
        return f"empties {scoring.granularity}, which recovery would fill again; set recovery.objective: none"
    return None


def _check_search(search: SearchConfig, evaluations: Iterable[EvaluationSpec]) -> None:
    """Whether the scheduler's metric is of a text or task that every evaluation measures."""
    if search.scheduler == "none":
        return
    for evaluation in evaluations:
        subjects = [*(text.name for text in evaluation.perplexity), *evaluation.tasks, *evaluation.probes]
        if search.metric.partition("/")[0] not in subjects:
            raise unknown_name("search.metric", search.metric, [f"{subject}/…" for subject in subjects])


def _teachers(methods: Iterable[MethodConfig]) -> set[ModelSpec]:
    return {model_spec(m.recovery.teacher) for m in methods if m.recovery.teacher is not None}


def _heals(method: MethodConfig) -> bool:
    return find_objective(method.recovery.objective).heals


def _texts(methods: Iterable[MethodConfig], evaluations: Iterable[EvaluationSpec]) -> set[TextSpec]:
    texts = {perplexity.data for evaluation in evaluations for perplexity in evaluation.perplexity}
    for method in methods:
        texts.add(text_spec(method.scoring.calibration))
        if _heals(method):
            texts.add(text_spec(method.recovery.data))
    return texts


def _text_bytes(text: TextSpec) -> int | None:
    """Size of a text that lies in a file of this machine."""
    file = builtin_file(text.builtin) if text.builtin else Path(text.path or "").expanduser()
    return file.stat().st_size if file.is_file() else None


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


def stages_of_iteration(trajectory: TrajectoryPlan, iteration: IterationPlan) -> int:
    """Stages of one iteration: scoring and pruning, and what else it has."""
    evaluations = iteration.is_measured * (1 + trajectory.also_before_recovery)
    recoveries = trajectory.recovers(iteration) * (1 + (trajectory.method.recovery.start is not None))
    return 2 + recoveries + evaluations + iteration.is_target


def stages_once(trajectory: TrajectoryPlan) -> int:
    """Stages of a trajectory before its iterations: the dense evaluation, and generation."""
    return 1 + (trajectory.generation_spec() is not None)


def num_stages(trajectory: TrajectoryPlan) -> int:
    """Stages of a trajectory: those once, and those of every iteration."""
    each = (stages_of_iteration(trajectory, iteration) for iteration in trajectory.iterations)
    return stages_once(trajectory) + sum(each)
