"""Where a stage's work is done: in this process, or on Ray actors and Ray Train.

Both compute the same numbers; `execution.backend` chooses. The rooms load what computes
when it is first asked for, which for Ray is on the actors alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from actors import evaluation, generation, models, recovery, scoring
from actors.artifacts import cache_entry, local_path
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
    no_progress,
)
from actors.evaluation.ray import evaluate_all_on_ray, evaluate_on_ray
from actors.generation.ray import generate_on_ray
from actors.models.ray import export_on_ray
from actors.ray_pool import run_in_task
from actors.recovery.ray import recover_on_ray
from actors.scoring.ray import score_on_ray
from orchestrator.config import ExecutionConfig
from orchestrator.config.campaign import PoolConfig, WorkerConfig
from orchestrator.execution.stage_runner import Backend
from orchestrator.execution.task_scoring import score_by_task
from orchestrator.storage.stage_store import Store


class LocalBackend:
    """Every stage in this process, without Ray."""

    def __init__(self, _execution: ExecutionConfig, store: Store):
        self._store = store

    def score(self, spec: ScoreSpec, progress: Progress) -> ScoreResult:
        if spec.task is not None:
            return score_by_task(spec, self._evaluate_all, progress)
        return scoring.score_locally(spec, progress)

    def generate(self, spec: GenerationSpec, uri: str, progress: Progress) -> GenerationResult:
        return generation.generate_locally(spec, uri, progress)

    def recover(self, spec: RecoverySpec, uri: str, key: str, progress: Progress) -> RecoveryResult:
        work_dir = local_path(self._store.train_uri(key)) or cache_entry("train", key)
        return recovery.recover_locally(spec, uri, work_dir, progress)

    def evaluate(self, spec: EvaluationSpec, progress: Progress) -> EvaluationResult:
        return evaluation.evaluate_model(spec, progress)

    def _evaluate_all(self, specs: Sequence[EvaluationSpec]) -> Iterator[tuple[int, EvaluationResult]]:
        for position, spec in enumerate(specs):
            yield position, self.evaluate(spec, no_progress)

    def export(self, spec: ExportSpec, uri: str) -> ExportResult:
        return models.export_model(spec, uri)


class RayBackend:
    """Scoring, generation and evaluation on actors, recovery as a Ray Train job.

    One class of resources is held at a time and released before the next is
    asked for, so trajectories that share a cluster never wait for each other
    in a circle.
    """

    def __init__(self, execution: ExecutionConfig, store: Store):
        self._execution = execution
        self._store = store

    def score(self, spec: ScoreSpec, progress: Progress) -> ScoreResult:
        if spec.task is not None:
            return score_by_task(spec, self._evaluate_all, progress)
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

    def _evaluate_all(self, specs: Sequence[EvaluationSpec]) -> Iterator[tuple[int, EvaluationResult]]:
        """As many evaluations at a time as scoring may have actors, each with what an evaluation holds."""
        pool = replace(self._pool(self._execution.evaluation), actors=self._execution.scoring.actors)
        return evaluate_all_on_ray(specs, pool)

    def _pool(self, actors: PoolConfig | WorkerConfig) -> ActorPoolSpec:
        return ActorPoolSpec(actors.actors, actors.cpus, actors.gpus, self._execution.start_timeout_s)

    def export(self, spec: ExportSpec, uri: str) -> ExportResult:
        worker = self._execution.evaluation
        return export_on_ray(spec, uri, cpus=worker.cpus, gpus=worker.gpus)


BACKENDS: dict[str, Callable[[ExecutionConfig, Store], Backend]] = {"local": LocalBackend, "ray": RayBackend}
