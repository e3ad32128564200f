"""What a stage of each kind holds on the cluster.

The one answer to that question: admission, `iterabre plan`, the budget and the check of the cluster use it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.contracts import ScoreSpec
from orchestrator.config import ExecutionConfig

ROUNDING = 1e-6
"""Fractions of a GPU do not add up exactly."""

TASK_SCORING = "score by task"
"""Scoring by an lm-eval task: it evaluates a model for each candidate, and so holds evaluators."""


@dataclass(frozen=True)
class ResourceBundle:
    """Processors and GPUs: what a cluster has, or what a stage holds of it."""

    cpus: float
    gpus: float

    def holds(self, other: "ResourceBundle") -> bool:
        """Return whether `other` fits in here."""
        return other.cpus <= self.cpus + ROUNDING and other.gpus <= self.gpus + ROUNDING

    def without(self, other: "ResourceBundle") -> "ResourceBundle":
        """Return what is left when `other` is taken, or as much of it as there is."""
        return ResourceBundle(max(0.0, self.cpus - other.cpus), max(0.0, self.gpus - other.gpus))

    def times(self, number: int) -> "ResourceBundle":
        """Return so many of it."""
        return ResourceBundle(number * self.cpus, number * self.gpus)

    def count(self, other: "ResourceBundle") -> int:
        """Return how often `other` goes into this one; a million times if it holds nothing."""
        shares = [
            have / need for have, need in ((self.cpus, other.cpus), (self.gpus, other.gpus)) if need > 0
        ]
        return int(min(shares, default=1e6) + ROUNDING)


@dataclass(frozen=True)
class ResourceRequest:
    """What a stage needs to begin, and what it holds if it can: a pool begins with one actor."""

    min: ResourceBundle
    max: ResourceBundle


def resource_kind(kind: str, spec: Any) -> str:
    """Return the kind of stage under which `stage_resources` has what a stage with this spec holds."""
    return TASK_SCORING if isinstance(spec, ScoreSpec) and spec.task is not None else kind


def stage_resources(execution: ExecutionConfig) -> dict[str, ResourceRequest]:
    """Return what a stage of each kind requests; kinds that are not named hold nothing."""
    scoring, generation, training = execution.scoring, execution.generation, execution.training
    evaluator = ResourceBundle(execution.evaluation.cpus, execution.evaluation.gpus)
    trainers = ResourceBundle(training.cpus, training.gpus).times(training.workers)

    def pool(actor: ResourceBundle, actors: int) -> ResourceRequest:
        return ResourceRequest(actor, actor.times(actors))

    return {
        "score": pool(ResourceBundle(scoring.cpus, scoring.gpus), scoring.actors),
        TASK_SCORING: pool(evaluator, scoring.actors),
        "generate": pool(ResourceBundle(generation.cpus, generation.gpus), generation.actors),
        "recover": ResourceRequest(trainers, trainers),
        "evaluate": pool(evaluator, execution.evaluation.actors),
        "export": pool(evaluator, 1),
    }


def devices_held(execution: ExecutionConfig) -> Mapping[str, float]:
    """Return the devices that a stage of each kind holds: its GPUs, or its CPUs if no stage uses a GPU."""
    held = {kind: request.max for kind, request in stage_resources(execution).items()}
    on_gpus = any(bundle.gpus for bundle in held.values())
    return {kind: bundle.gpus if on_gpus else bundle.cpus for kind, bundle in held.items()}
