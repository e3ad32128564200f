"""The work of stages on Ray actors and Ray Train.

The numbers are those of `orchestrator.execution.local`. The packages that compute are loaded on the
actors alone.
"""

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
    TeachResult,
    TeachSpec,
)
from actors.evaluation.ray import evaluate_all_on_ray, evaluate_on_ray
from actors.generation.ray import generate_on_ray
from actors.models.ray import export_on_ray
from actors.ray_pool import run_in_task
from actors.recovery.ray import recover_on_ray
from actors.scoring.ray import score_on_ray
from actors.teaching.ray import teach_on_ray
from orchestrator.config import ExecutionConfig
from orchestrator.execution.task_scoring import score_by_task
from orchestrator.scheduling.resources import resource_kind, stage_resources
from orchestrator.storage.stage_store import Store


class RayBackend:
    """Scoring, generation, teaching, evaluation and export on actors, recovery as a Ray Train job.

    A stage's resources are released before the next stage requests its own, so trajectories that
    share a cluster never wait for each other in a circle.
    """

    def __init__(self, execution: ExecutionConfig, store: Store):
        self._execution = execution
        self._requests = stage_resources(execution)
        self._store = store

    def score(self, spec: ScoreSpec, progress: Progress) -> ScoreResult:
        pool = self._pool(resource_kind("score", spec))
        if spec.task is not None:
            # As many at a time as scoring may have actors, each with what an evaluation holds.
            return score_by_task(spec, lambda specs: evaluate_all_on_ray(specs, pool, progress), progress)
        return score_on_ray(spec, pool, progress)

    def generate(self, spec: GenerationSpec, uri: str, progress: Progress) -> GenerationResult:
        return run_in_task(generate_on_ray, spec, uri, self._pool("generate"), progress=progress)

    def teach(self, spec: TeachSpec, uri: str, progress: Progress) -> TeachResult:
        return run_in_task(teach_on_ray, spec, uri, self._pool("teach"), progress=progress)

    def recover(self, spec: RecoverySpec, uri: str, key: str, progress: Progress) -> RecoveryResult:
        training = self._execution.training
        return recover_on_ray(
            spec,
            adapter_uri=uri,
            name=key,
            storage_path=self._store.train_uri(key),
            pool=self._pool(resource_kind("recover", spec)),
            replacement_timeout_s=training.replacement_timeout_s,
            max_failures=training.max_failures,
            collective_timeout_s=training.collective_timeout_s,
            progress_handle=progress,
        )

    def evaluate(self, spec: EvaluationSpec, uri: str, key: str, progress: Progress) -> EvaluationResult:
        return evaluate_on_ray(spec, self._pool("evaluate"), progress, uri, self._store.parts_uri(key))

    def export(self, spec: ExportSpec, uri: str, progress: Progress) -> ExportResult:
        return export_on_ray(spec, uri, self._pool("export"), progress)

    def _pool(self, kind: str) -> ActorPoolSpec:
        request = self._requests[kind]
        bundle = request.bundle
        return ActorPoolSpec(
            request.max_count,
            bundle.cpus,
            bundle.gpus,
            self._execution.start_timeout_s,
            bundle.memory_bytes,
            bundle.accelerator,
            bundle.labels,
        )
