"""Where a stage's work is done: in this process, or on Ray actors and Ray Train.

Both compute the same numbers; `execution.backend` chooses. The rooms load what computes
when it is first asked for, which for Ray is on the actors alone.
"""

from collections.abc import Callable, Iterator, Sequence

from actors import evaluation, generation, models, recovery, scoring
from actors.artifacts import cache_entry, local_path
from actors.contracts import (
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
from actors.ray_pool import conducted, export_on_ray
from actors.recovery.ray import recover_on_ray
from actors.scoring.ray import score_on_ray
from orchestrator.config import ExecutionConfig
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
        pool, timeout_s = self._execution.scoring, self._execution.start_timeout_s
        return conducted(
            score_on_ray,
            spec,
            actors=pool.actors,
            cpus=pool.cpus,
            gpus=pool.gpus,
            start_timeout_s=timeout_s,
            progress=progress,
        )

    def generate(self, spec: GenerationSpec, uri: str, progress: Progress) -> GenerationResult:
        pool, timeout_s = self._execution.generation, self._execution.start_timeout_s
        return conducted(
            generate_on_ray,
            spec,
            uri,
            actors=pool.actors,
            cpus=pool.cpus,
            gpus=pool.gpus,
            start_timeout_s=timeout_s,
            progress=progress,
        )

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
        worker, timeout_s = self._execution.evaluation, self._execution.start_timeout_s
        return evaluate_on_ray(
            spec,
            actors=worker.actors,
            cpus=worker.cpus,
            gpus=worker.gpus,
            start_timeout_s=timeout_s,
            progress=progress,
        )

    def _evaluate_all(self, specs: Sequence[EvaluationSpec]) -> Iterator[tuple[int, EvaluationResult]]:
        """As many evaluations at a time as scoring may have actors, each with what an evaluation holds."""
        worker, timeout_s = self._execution.evaluation, self._execution.start_timeout_s
        return evaluate_all_on_ray(
            specs,
            actors=self._execution.scoring.actors,
            cpus=worker.cpus,
            gpus=worker.gpus,
            start_timeout_s=timeout_s,
        )

    def export(self, spec: ExportSpec, uri: str) -> ExportResult:
        worker = self._execution.evaluation
        return export_on_ray(spec, uri, cpus=worker.cpus, gpus=worker.gpus)


BACKENDS: dict[str, Callable[[ExecutionConfig, Store], Backend]] = {"local": LocalBackend, "ray": RayBackend}
