"""Frozen specs and results that cross between packages, processes and machines.

Standard library only, so that every process can import it in no time.
`*Spec` is requested, `*Result` is measured, `*Ref` points at an artifact.
Weights never travel inside these objects; they are referred to by URI and hash.
"""

from actors.contracts.artifacts import ArtifactRef, FileRef, digest, to_json
from actors.contracts.data import TextInfo, TextSpec
from actors.contracts.evaluation import (
    EvaluationResult,
    EvaluationSpec,
    FewShot,
    Metric,
    PerplexitySpec,
    ThroughputSpec,
)
from actors.contracts.generation import GenerationResult, GenerationSpec
from actors.contracts.models import (
    BLOCK,
    ExportResult,
    ExportSpec,
    Merge,
    ModelInfo,
    ModelRef,
    ModelSpec,
    Origin,
)
from actors.contracts.pool import ActorPoolSpec
from actors.contracts.progress import Progress, no_progress
from actors.contracts.recovery import AdapterSpec, LossSpec, RecoveryResult, RecoverySpec, StepRecord
from actors.contracts.scoring import MergeSpec, ScoreResult, ScoreSpec, TaskSpec

__all__ = [
    "ActorPoolSpec",
    "AdapterSpec",
    "ArtifactRef",
    "BLOCK",
    "EvaluationResult",
    "EvaluationSpec",
    "ExportResult",
    "ExportSpec",
    "FewShot",
    "FileRef",
    "GenerationResult",
    "GenerationSpec",
    "LossSpec",
    "Merge",
    "MergeSpec",
    "Metric",
    "ModelInfo",
    "ModelRef",
    "ModelSpec",
    "Origin",
    "PerplexitySpec",
    "Progress",
    "RecoveryResult",
    "RecoverySpec",
    "ScoreResult",
    "ScoreSpec",
    "StepRecord",
    "TaskSpec",
    "TextInfo",
    "TextSpec",
    "ThroughputSpec",
    "digest",
    "no_progress",
    "to_json",
]
