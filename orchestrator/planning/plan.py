"""What a campaign will do: trajectories, and the specs of their stages."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast, get_type_hints

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from actors.contracts import (
    Dtype,
    Ends,
    EvaluationSpec,
    ExportSpec,
    GenerationSpec,
    ModelInfo,
    ModelRef,
    ModelSpec,
    Origin,
    RecoverySpec,
    ScoreSpec,
    TaskSpec,
    TeachSpec,
    TextSettings,
    TextSpec,
    digest,
    extend,
)
from orchestrator.config import MethodConfig
from orchestrator.planning.evaluation_parts import evaluation_parts
from orchestrator.planning.keys import key_inputs
from orchestrator.planning.pruning_schedule import IterationPlan

BYTES_PER_TOKEN = 4
"""Assumption: length of a token in English text."""

TOKENS_PER_ROW, UNKNOWN_ROWS = 100, 1000
"""Assumption: length of a row of a text whose size is not known, and the rows of one of which nothing is."""

DEFAULT_STATES: Dtype = "bfloat16"
"""Type of hidden states where none are stored."""

TRAINED_BYTES = 12
"""Of each trained parameter in a checkpoint: its value and two moments in float32."""


@dataclass(frozen=True)
class Traits:
    """The properties of a method's criterion and objective that a plan needs.

    Their rows hold functions, and so all that these import; a plan goes to every trial.

    Attributes:
        seeded: the scores depend on the seed.
        chooses_run: the layers to go are chosen together, so that scores depend on how many go.
        applies_recovery: anything is done to the pruned model.
        trains_on: kind of data, as in `Objective`.
    """

    seeded: bool
    chooses_run: bool
    applies_recovery: bool
    trains_on: str


@dataclass(frozen=True)
class TrajectoryPlan:
    """One model taken by one method, with one seed, from full depth to the deepest target.

    `any_layers` if the model's config can be without any of its layers, not only some.
    `teacher_cache` is what recoveries read in place of running the teacher, as was decided for `auto`.
    `texts` gives each text as it was found, so that another in its place is refused. `former_evaluations`
    are what earlier forms of the campaign asked for: what they measured is taken over.
    """

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
    traits: Traits
    any_layers: bool
    origin: Origin
    texts: Mapping[TextSpec, TextSpec] = field(default_factory=dict)
    teacher_cache: Literal["off", "hidden", "topk"] = "off"
    former_evaluations: tuple[EvaluationSpec, ...] = ()

    @property
    def dense(self) -> ModelRef:
        """The unpruned model."""
        return ModelRef(self.model.spec)

    @property
    def protected_layers(self) -> tuple[int, ...]:
        """The layers that may not go, as `scoring.protected` says."""
        given, depth = self.method.scoring.protected, self.model.num_layers
        if isinstance(given, Ends):
            given = (*range(given.first), *range(depth - given.last, depth))
        return tuple(sorted({*given}))

    @property
    def recovery_tokens(self) -> int:
        """Tokens of one recovery, at most; none where nothing is trained."""
        return self.method.recovery.max_tokens if self.traits.applies_recovery else 0

    def recovers(self, iteration: IterationPlan) -> bool:
        """Return whether the pruned model of the iteration is recovered."""
        return iteration.recovers and self.traits.applies_recovery

    @property
    def recovery_text(self) -> TextSpec:
        """The text that recovery is configured with; for generated responses, the prompts."""
        return self._found(self.method.recovery.data)

    def _found(self, text: TextSettings) -> TextSpec:
        spec = extend(TextSpec, text)
        return self.texts.get(spec, spec)

    def score_spec(self, model: ModelRef, layers_to_drop: int = 1) -> ScoreSpec:
        """Return the request for scoring `model`, from which so many layers are to go."""
        scoring, evaluation = self.method.scoring, self.evaluation
        # Where the config cannot be without any layers, the best may have to stay: every score is needed.
        eliminate, screen_dtype = (
            (scoring.eliminate, scoring.screen_dtype) if self.any_layers else (False, None)
        )
        goes_by_portion = self.traits.chooses_run or eliminate or screen_dtype is not None
        task = scoring.task and extend(
            TaskSpec,
            scoring.task,
            include_path=evaluation.include_path,
            batch_size=evaluation.batch_size,
            tasks_fingerprint=evaluation.tasks_fingerprint,
            apply_chat_template=evaluation.apply_chat_template,
            system_instruction=evaluation.system_instruction,
        )
        return extend(
            ScoreSpec,
            scoring,
            model=model,
            calibration=self._found(scoring.calibration),
            task=task,
            protected=self.protected_layers,
            eliminate=eliminate,
            screen_dtype=screen_dtype,
            # Seed and portion are left out where they do not matter, so that all share one stage.
            seed=self.seed if self.traits.seeded else 0,
            num_remove=layers_to_drop if goes_by_portion else 1,
        )

    def generation_spec(self) -> GenerationSpec | None:
        """Return what the unpruned model has to generate before the first recovery; None if nothing."""
        if self.traits.trains_on != "responses":
            return None
        generation = self.method.recovery.generation
        # Nothing is drawn at temperature 0, so all seeds share one stage.
        seed = self.seed if generation.temperature else 0
        return extend(
            GenerationSpec, generation, model=self.model.spec, prompts=self.recovery_text, seed=seed
        )

    def teach_spec(self) -> TeachSpec | None:
        """Return what the teacher has to compute before the first recovery; None if it runs in each."""
        if self.teacher_cache == "off":
            return None
        spec, topk = self.recovery_spec(self.dense), self.teacher_cache == "topk"
        precision = cast(Dtype, spec.precision or self.model.spec.dtype)  # the plan knows what `auto` means
        return TeachSpec(
            model=spec.teacher or self.model.spec,
            data=spec.data,
            packing=spec.packing,
            sequence_length=spec.sequence_length,
            special_tokens=spec.special_tokens,
            precision=precision,
            # What makes no difference is left out, so that all share one stage.
            states=DEFAULT_STATES if topk else spec.teacher_cache_dtype or precision,
            top_k=spec.teacher_top_k if topk else None,
            entering=() if topk else tuple(sorted({*spec.teacher_cache_blocks})),
            max_tokens=spec.max_tokens if spec.data.streaming else None,
            seed=self.seed if spec.data.streaming else 0,
            batch_size=spec.micro_batch_size,
            max_gb=spec.teacher_cache_gb,
        )

    def start_spec(self, model: ModelRef, data: TextSpec) -> RecoverySpec:
        """Return what is done to `model` before its recovery, where `recovery.start` says so.

        Only what it depends on is set, so that methods that differ in the rest share it.
        """
        recovery = self.method.recovery
        return RecoverySpec(
            model=model,
            data=data,
            objective=str(recovery.start),
            packing=recovery.packing,
            special_tokens=recovery.special_tokens,
            sequence_length=recovery.sequence_length,
            batch_size=recovery.batch_size,
            micro_batch_size=recovery.micro_batch_size,
            max_tokens=recovery.start_tokens or recovery.max_tokens,
            precision=recovery.precision,
            seed=self.seed,
        )

    def recovery_spec(self, model: ModelRef, data: TextSpec | None = None) -> RecoverySpec:
        """Return the request for recovering the pruned `model`, on `data` if not the configured text."""
        recovery = self.method.recovery
        teacher = recovery.teacher and extend(ModelSpec, recovery.teacher)
        # The described one is equal, and has the hash of its files.
        teacher = next((described for described in self.fingerprints if described == teacher), teacher)
        return extend(
            RecoverySpec,
            recovery,
            model=model,
            data=data or self.recovery_text,
            teacher=teacher,
            seed=self.seed,
            deepspeed=self.deepspeed,
        )

    def evaluation_spec(self, model: ModelRef) -> EvaluationSpec:
        """Return the request for evaluating `model`."""
        return replace(self.evaluation, model=model)

    def evaluation_parts(
        self, model: ModelRef, is_stored: Callable[[EvaluationSpec], bool]
    ) -> list[EvaluationSpec]:
        """Return requests that together evaluate `model`, such that what is stored is not measured again."""
        former = [replace(evaluation, model=model) for evaluation in self.former_evaluations]
        return evaluation_parts(self.evaluation_spec(model), former, is_stored)

    def continued(self, recorded: Sequence["TrajectoryPlan"]) -> "TrajectoryPlan":
        """Return the plan as it goes on from those that the run recorded before.

        Evaluations that were asked for of the same model are taken over, and with them their seed.
        """
        if not recorded:
            return self
        evaluation = replace(self.evaluation, seed=recorded[0].evaluation.seed)
        same = [plan for plan in recorded if plan.model.fingerprint == self.model.fingerprint]
        former = [each for plan in same for each in (*plan.former_evaluations, plan.evaluation)]
        known = {digest(self.key_inputs(evaluation))}
        kept: list[EvaluationSpec] = []
        for each in former:
            if (identity := digest(self.key_inputs(replace(each, model=self.dense)))) not in known:
                known.add(identity)
                kept.append(each)
        return replace(self, evaluation=evaluation, former_evaluations=tuple(kept))

    def key_inputs(self, spec: Any) -> Any:
        """Return all that a spec's result depends on, as JSON values; see `keys.key_inputs`."""
        known = {**self.fingerprints, self.model.spec: self.model.fingerprint}
        if isinstance(spec, EvaluationSpec):  # an earlier one may be of a text that was another then
            found = {text.data: text.data.fingerprint for text in spec.perplexity}
            known |= {text: fingerprint for text, fingerprint in found.items() if fingerprint is not None}
        return key_inputs(spec, known)

    def export_inputs(self, model: ModelRef, iteration: IterationPlan) -> Any:
        """Return what the export of `model` depends on: the model, and where in the run it is written."""
        directory = f"{self.id}/{iteration.layers_left}-layers"
        return {**self.key_inputs(ExportSpec(model)), "directory": directory}

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values, from which `from_json` makes an equal one."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        # Keys of JSON are text, so what has specs for keys becomes pairs.
        hashes = self.fingerprints.items()
        values["fingerprints"] = {
            "texts": [pair for pair in hashes if isinstance(pair[0], TextSpec)],
            "models": [pair for pair in hashes if isinstance(pair[0], ModelSpec)],
        }
        values["texts"] = list(self.texts.items())
        return to_jsonable_python(values)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "TrajectoryPlan":
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is no plan that this version can read.
        """
        types = get_type_hints(cls, include_extras=True)
        types["texts"] = tuple[tuple[TextSpec, TextSpec], ...]
        types["fingerprints"] = _Fingerprints
        values = {
            name: TypeAdapter(types[name]).validate_json(json.dumps(value)) for name, value in raw.items()
        }
        hashes = values["fingerprints"]
        return cls(
            **{**values, "fingerprints": dict(hashes.texts + hashes.models), "texts": dict(values["texts"])}
        )


@dataclass(frozen=True)
class _Fingerprints:
    texts: tuple[tuple[TextSpec, str], ...]
    models: tuple[tuple[ModelSpec, str], ...]


@dataclass(frozen=True)
class TextSize:
    """How long a text is, where that is known before it is read into tokens."""

    num_rows: int | None = None
    num_bytes: int | None = None

    @property
    def rows(self) -> int:
        """The rows, or a guess."""
        return self.num_rows or UNKNOWN_ROWS

    @property
    def tokens(self) -> float:
        """Roughly the tokens."""
        return self.num_bytes / BYTES_PER_TOKEN if self.num_bytes else self.rows * TOKENS_PER_ROW


@dataclass(frozen=True)
class CampaignPlan:
    """Everything a campaign will do, and `notes` of what is no fault and worth knowing."""

    name: str
    trajectories: tuple[TrajectoryPlan, ...]
    text_sizes: Mapping[TextSpec, TextSize] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def taught_tokens(self, spec: TeachSpec) -> float:
        """Return roughly how many tokens a teacher is run on."""
        return spec.max_tokens or self.text_sizes.get(spec.data, TextSize()).tokens

    def needed_bytes(self) -> int:
        """Return the disk space of the exported models and of what stages leave, roughly.

        Full fine-tuning leaves full weights at every recovery, and while it trains two checkpoints with
        the optimizer's state, which go when it is done: those of one recovery at a time are counted.
        """
        needed, training = 0, 0
        taught: dict[str, float] = {}
        for trajectory in self.trajectories:
            bytes_per_parameter = 4 if trajectory.model.spec.dtype == "float32" else 2
            exports = sum(iteration.is_target for iteration in trajectory.iterations)
            weights = trajectory.model.num_parameters * bytes_per_parameter
            # Adapters and two training checkpoints with optimizer state are small beside full weights.
            needed += int(weights * (exports + 0.25))
            recoveries = sum(trajectory.recovers(iteration) for iteration in trajectory.iterations)
            if recoveries and trajectory.method.recovery.adapter.leaves_weights:
                needed += weights * recoveries
                training = max(training, trajectory.model.num_parameters * TRAINED_BYTES * 2)
            if (spec := trajectory.teach_spec()) is not None:
                bytes_each = spec.bytes_per_token(trajectory.model.hidden_size)
                taught[digest(trajectory.key_inputs(spec))] = self.taught_tokens(spec) * bytes_each
        return needed + training + int(sum(taught.values()))

    def find(self, trajectory_id: str) -> TrajectoryPlan:
        """Return the trajectory of that id."""
        return next(t for t in self.trajectories if t.id == trajectory_id)
