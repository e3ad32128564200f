"""The work of stages in this process, without Ray."""

from actors import evaluation, generation, models, recovery, scoring, teaching
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
    TeachResult,
    TeachSpec,
)
from orchestrator.config import ExecutionConfig
from orchestrator.execution.task_scoring import score_by_task
from orchestrator.storage.stage_store import Store


class LocalBackend:
    """Every stage in this process, without Ray."""

    def __init__(self, _execution: ExecutionConfig, store: Store):
        self._store = store

    def score(self, spec: ScoreSpec, progress: Progress) -> ScoreResult:
        if spec.task is not None:
            return score_by_task(spec, evaluation.evaluate_prunings, progress)
        return scoring.score_locally(spec, progress)

    def generate(self, spec: GenerationSpec, uri: str, progress: Progress) -> GenerationResult:
        return generation.generate_locally(spec, uri, progress)

    def teach(self, spec: TeachSpec, uri: str, progress: Progress) -> TeachResult:
        return teaching.teach_locally(spec, uri, progress)

    def recover(self, spec: RecoverySpec, uri: str, key: str, progress: Progress) -> RecoveryResult:
        work_dir = local_path(self._store.train_uri(key)) or cache_entry("train", key)
        return recovery.recover_locally(spec, uri, work_dir, progress)

    def evaluate(self, spec: EvaluationSpec, uri: str, key: str, progress: Progress) -> EvaluationResult:
        return evaluation.evaluate_model(spec, progress, uri, self._store.parts_uri(key))

    def export(self, spec: ExportSpec, uri: str, progress: Progress) -> ExportResult:
        return models.export_model(spec, uri)
