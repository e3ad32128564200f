"""Frozen settings, specs and results that cross between packages, processes and machines.

Standard library and annotated_types only, so that every process can import it in no time.
`*Settings` and the specs without a model are what a campaign file says (see `settings.py`).
`*Spec` is requested, `*Result` is measured, `*Ref` points at an artifact.
Weights never travel inside these objects; they are referred to by URI and hash.
"""

from actors.contracts.artifacts import ArtifactRef, FileRef, digest, to_json
from actors.contracts.data import NO_ROWS, RowCounts, TextInfo, TextSettings, TextSpec
from actors.contracts.evaluation import (
    EvaluationResult,
    EvaluationSettings,
    EvaluationSpec,
    FewShot,
    Metric,
    PerplexitySettings,
    PerplexitySpec,
    ThroughputSpec,
)
from actors.contracts.generation import GenerationResult, GenerationSettings, GenerationSpec
from actors.contracts.models import (
    DTYPE_BYTES,
    Dtype,
    ExportResult,
    ExportSpec,
    Merge,
    ModelDtype,
    ModelInfo,
    ModelRef,
    ModelSettings,
    ModelSpec,
    Origin,
    common_base,
)
from actors.contracts.pool import ActorPoolSpec
from actors.contracts.progress import ClusterProgress, Progress, WaitingTime, no_progress, on_cluster
from actors.contracts.recovery import (
    CLOSED_FORM_OBJECTIVES,
    AdapterSpec,
    BelowCut,
    LossSpec,
    RecoveryResult,
    RecoverySettings,
    RecoverySpec,
    StepRecord,
)
from actors.contracts.scoring import (
    MERGING_CRITERIA,
    SCORE_METRICS,
    Ends,
    MergeSpec,
    Removal,
    ScoreKind,
    ScoreResult,
    ScoreSpec,
    ScoringSettings,
    TaskSettings,
    TaskSpec,
)
from actors.contracts.settings import Doc, LocalPath, Name, Settings, extend
from actors.contracts.teaching import LOG_PROBABILITIES_DTYPE, TeachResult, TeachSpec

__all__ = [
    "CLOSED_FORM_OBJECTIVES",
    "MERGING_CRITERIA",
    "SCORE_METRICS",
    "ActorPoolSpec",
    "AdapterSpec",
    "BelowCut",
    "ArtifactRef",
    "ClusterProgress",
    "DTYPE_BYTES",
    "Doc",
    "Dtype",
    "Ends",
    "EvaluationResult",
    "EvaluationSettings",
    "EvaluationSpec",
    "ExportResult",
    "ExportSpec",
    "FewShot",
    "FileRef",
    "GenerationResult",
    "GenerationSettings",
    "GenerationSpec",
    "LOG_PROBABILITIES_DTYPE",
    "LocalPath",
    "LossSpec",
    "Merge",
    "MergeSpec",
    "Metric",
    "ModelDtype",
    "ModelInfo",
    "ModelRef",
    "ModelSettings",
    "ModelSpec",
    "NO_ROWS",
    "Name",
    "Origin",
    "PerplexitySettings",
    "PerplexitySpec",
    "Progress",
    "RecoveryResult",
    "RecoverySettings",
    "RecoverySpec",
    "Removal",
    "RowCounts",
    "ScoreKind",
    "ScoreResult",
    "ScoreSpec",
    "ScoringSettings",
    "Settings",
    "StepRecord",
    "TaskSettings",
    "TaskSpec",
    "TeachResult",
    "TeachSpec",
    "TextInfo",
    "TextSettings",
    "TextSpec",
    "ThroughputSpec",
    "WaitingTime",
    "common_base",
    "digest",
    "extend",
    "no_progress",
    "on_cluster",
    "to_json",
]
