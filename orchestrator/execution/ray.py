"""The work of stages on Ray actors and Ray Train, and the coordinator in an actor of its own.

The numbers are those of `orchestrator.execution.local`. The packages that compute are loaded on the
actors alone.
"""

from dataclasses import replace
from typing import Any

import ray

from actors.contracts import (
    ActorPoolSpec,
    EvaluationResult,
    EvaluationSpec,
    ExportResult,
    ExportSpec,
    GenerationResult,
    GenerationSpec,
    Progress,
    RecoveryResult,
    RecoverySpec,
    ScoreResult,
    ScoreSpec,
)
from actors.evaluation.ray import evaluate_all_on_ray, evaluate_on_ray
from actors.generation.ray import generate_on_ray
from actors.models.ray import export_on_ray
from actors.ray_pool import run_in_task
from actors.recovery.ray import recover_on_ray
from actors.scoring.ray import score_on_ray
from orchestrator.config import ExecutionConfig, PoolConfig, WorkerConfig
from orchestrator.execution.task_scoring import score_by_task
from orchestrator.scheduling.coordinator import LeaseReply, LeaseRequest
from orchestrator.storage.stage_store import Store


class RayBackend:
    """Scoring, generation and evaluation on actors, recovery as a Ray Train job.

    A stage's resources are released before the next stage requests its own, so trajectories that
    share a cluster never wait for each other in a circle.
    """

    def __init__(self, execution: ExecutionConfig, store: Store):
        self._execution = execution
        self._store = store

    def score(self, spec: ScoreSpec, progress: Progress) -> ScoreResult:
        if spec.task is not None:
            # As many at a time as scoring may have actors, each with what an evaluation holds.
            pool = replace(self._pool(self._execution.evaluation), actors=self._execution.scoring.actors)
            return score_by_task(spec, lambda specs: evaluate_all_on_ray(specs, pool), progress)
        return run_in_task(score_on_ray, spec, self._pool(self._execution.scoring), progress)

    def generate(self, spec: GenerationSpec, uri: str, progress: Progress) -> GenerationResult:
        return run_in_task(generate_on_ray, spec, uri, self._pool(self._execution.generation), progress)

    def recover(self, spec: RecoverySpec, uri: str, key: str, progress: Progress) -> RecoveryResult:
        training = self._execution.training
        return recover_on_ray(
            spec,
            adapter_uri=uri,
            name=key,
            storage_path=self._store.train_uri(key),
            workers=training.workers,
            cpus_per_worker=training.cpus,
            gpus_per_worker=training.gpus,
            start_timeout_s=self._execution.start_timeout_s,
            max_failures=training.max_failures,
            progress_handle=progress,
        )

    def evaluate(self, spec: EvaluationSpec, progress: Progress) -> EvaluationResult:
        return evaluate_on_ray(spec, self._pool(self._execution.evaluation), progress)

    def _pool(self, actors: PoolConfig | WorkerConfig) -> ActorPoolSpec:
        return ActorPoolSpec(actors.actors, actors.cpus, actors.gpus, self._execution.start_timeout_s)

    def export(self, spec: ExportSpec, uri: str) -> ExportResult:
        worker = self._execution.evaluation
        return export_on_ray(spec, uri, cpus=worker.cpus, gpus=worker.gpus)


class RayCoordinatorClient:
    """A `CoordinatorClient` of a coordinator that a Ray actor holds."""

    def __init__(self, actor: Any):
        self._actor = actor

    def try_acquire(self, request: LeaseRequest, wait_s: float = 0.0) -> LeaseReply:
        return ray.get(self._actor.try_acquire.remote(request, wait_s))

    def release(self, request: LeaseRequest, seconds: float) -> None:
        ray.get(self._actor.release.remote(request, seconds))

    def renew(self, holder: str) -> None:
        ray.get(self._actor.renew.remote(holder))

    def fail(self, trajectory: str) -> None:
        ray.get(self._actor.fail.remote(trajectory))

    def ended_by(self) -> str | None:
        return ray.get(self._actor.ended_by.remote())

    def is_cancelled(self, trajectory: str) -> bool:
        return ray.get(self._actor.is_cancelled.remote(trajectory))
