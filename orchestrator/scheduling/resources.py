"""What a stage of each kind holds on the cluster.

The one answer to that question: admission, the backend, `iterabre plan`, the budget and the check of the
cluster use it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from actors.contracts import CLOSED_FORM_OBJECTIVES, MERGING_CRITERIA, RecoverySpec, ScoreSpec
from orchestrator.config import ActorConfig, ExecutionConfig, MethodConfig

ROUNDING = 1e-6
"""Fractions of a GPU do not add up exactly."""

GB = 1e9

TASK_SCORING = "score by task"
"""Scoring by an lm-eval task: it evaluates a model for each candidate, and so holds evaluators."""

MERGE_SCORING = "score by merging"
"""Merges are tried one upon another, by one actor."""

CLOSED_FORM = "recover in closed form"
"""A recovery that solves for its weights: one worker, for nothing is trained."""


@dataclass(frozen=True)
class ResourceBundle:
    """What one actor or worker holds, all on one node.

    `accelerator` is the type of its GPUs, as Ray names it; `labels` are those that the node must have.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    memory_bytes: float = 0.0
    accelerator: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    def times(self, number: float) -> "ResourceBundle":
        """Return so many of it."""
        return replace(
            self,
            cpus=number * self.cpus,
            gpus=number * self.gpus,
            memory_bytes=number * self.memory_bytes,
        )

    def devices(self, on_gpus: bool) -> float:
        """Return its GPUs, or its CPUs where no stage uses a GPU."""
        return self.gpus if on_gpus else self.cpus

    def __str__(self) -> str:
        amounts = (
            (self.cpus, "CPU", not self.gpus),
            (self.gpus, f"{self.accelerator} GPU" if self.accelerator else "GPU", True),
            (self.memory_bytes / GB, "GB", True),
        )
        held = [f"{amount:g} {unit}" for amount, unit, shown in amounts if amount and shown]
        held += [f"{name}={value}" for name, value in self.labels.items()]
        return " and ".join(held) or "nothing"


@dataclass(frozen=True)
class ResourceRequest:
    """`min_count` bundles to begin, and up to `max_count` if it can: a pool begins with one actor."""

    bundle: ResourceBundle
    min_count: int = 1
    max_count: int = 1

    @property
    def min(self) -> ResourceBundle:
        """The total that it needs to begin."""
        return self.bundle.times(self.min_count)

    @property
    def max(self) -> ResourceBundle:
        """The total that it holds at most."""
        return self.bundle.times(self.max_count)

    def __str__(self) -> str:
        return f"{self.min_count} x {self.bundle}" if self.min_count > 1 else f"{self.bundle} on one node"


def resource_kind(kind: str, spec: Any) -> str:
    """Return the kind of stage under which `stage_resources` has what a stage with this spec holds."""
    if isinstance(spec, ScoreSpec):
        if spec.task is not None:
            return TASK_SCORING
        return MERGE_SCORING if spec.criterion in MERGING_CRITERIA else kind
    if isinstance(spec, RecoverySpec) and spec.objective in CLOSED_FORM_OBJECTIVES:
        return CLOSED_FORM
    return kind


def held_kinds(methods: Iterable[MethodConfig]) -> dict[tuple[str, str | None, str], str]:
    """Return the kinds of stages that hold other devices than their name says.

    By stage, phase and method: what the ledger has of a stage, in place of its spec.
    """
    kinds: dict[tuple[str, str | None, str], str] = {}
    for method in methods:
        if method.scoring.task is not None:
            kinds["score", None, method.name] = TASK_SCORING
        elif method.scoring.criterion in MERGING_CRITERIA:
            kinds["score", None, method.name] = MERGE_SCORING
        if method.recovery.objective in CLOSED_FORM_OBJECTIVES:
            kinds["recover", None, method.name] = CLOSED_FORM
        if method.recovery.start in CLOSED_FORM_OBJECTIVES:
            kinds["recover", "start", method.name] = CLOSED_FORM
    return kinds


def stage_resources(execution: ExecutionConfig) -> dict[str, ResourceRequest]:
    """Return what a stage of each kind requests; kinds that are not named hold nothing.

    A pool holds no more actors than `execution.max_devices` has devices for.
    """
    scoring, generation, training = execution.scoring, execution.generation, execution.training
    teaching = execution.teaching or scoring
    evaluator, trainer = _bundle(execution.evaluation), _bundle(training)
    sections = (scoring, generation, teaching, training, execution.evaluation)
    on_gpus = any(section.gpus for section in sections)

    def pool(actor: ResourceBundle, actors: int) -> ResourceRequest:
        held = actor.devices(on_gpus)
        if execution.max_devices is not None and held > 0:
            actors = min(actors, max(1, int(execution.max_devices / held + ROUNDING)))
        return ResourceRequest(actor, 1, actors)

    return {
        "score": pool(_bundle(scoring), scoring.actors),
        MERGE_SCORING: ResourceRequest(_bundle(scoring)),
        TASK_SCORING: pool(evaluator, scoring.actors),
        "generate": pool(_bundle(generation), generation.actors),
        "teach": pool(_bundle(teaching), teaching.actors),
        "recover": ResourceRequest(trainer, training.workers, training.workers),
        CLOSED_FORM: ResourceRequest(trainer),
        "evaluate": pool(evaluator, execution.evaluation.actors),
        "export": ResourceRequest(_bundle(execution.export)),
    }


SECTIONS = {
    "score": "scoring",
    MERGE_SCORING: "scoring",
    TASK_SCORING: "evaluation",
    "generate": "generation",
    "teach": "teaching",
    "recover": "training",
    CLOSED_FORM: "training",
    "evaluate": "evaluation",
    "export": "export",
}
"""The section of `execution` that says what a bundle of each kind holds."""


def devices_held(execution: ExecutionConfig) -> Mapping[str, float]:
    """Return the devices that a stage of each kind holds: its GPUs, or its CPUs if no stage uses a GPU."""
    on_gpus = uses_gpus(execution)
    return {kind: request.max.devices(on_gpus) for kind, request in stage_resources(execution).items()}


def uses_gpus(execution: ExecutionConfig) -> bool:
    """Return whether a stage of any kind holds GPUs."""
    return any(request.bundle.gpus for request in stage_resources(execution).values())


def _bundle(actor: ActorConfig) -> ResourceBundle:
    memory_bytes = (actor.memory_gb or 0.0) * GB
    return ResourceBundle(actor.cpus, actor.gpus, memory_bytes, actor.accelerator, actor.labels)
