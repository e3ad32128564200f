"""The campaign file: pydantic models of the YAML, and how it is read.

Imports neither torch nor ray, so that a wrong file is refused in well under a second.
Whether the named models, data, criteria and tasks exist is `orchestrator.plan`'s matter.
"""

from orchestrator.config.campaign import (
    CampaignConfig,
    ClusterMaximumConfig,
    CostConfig,
    ExcludeConfig,
    ExecutionConfig,
    MachineConfig,
    OverridesConfig,
    PoolConfig,
    SearchConfig,
    SourceModelConfig,
    StorageConfig,
    TargetConfig,
    TrainingConfig,
    WorkerConfig,
)
from orchestrator.config.reading import holds_credential, load_config, parse_config
from orchestrator.config.schema import campaign_schema
from orchestrator.config.sections import (
    NAME,
    AdapterConfig,
    EvaluationConfig,
    GenerationConfig,
    LossConfig,
    MergeConfig,
    MethodConfig,
    ModelConfig,
    PerplexityConfig,
    RecoveryConfig,
    ScheduleConfig,
    ScoringConfig,
    Section,
    TaskConfig,
    TextConfig,
    ThroughputConfig,
)

__all__ = [
    "AdapterConfig",
    "CampaignConfig",
    "CostConfig",
    "EvaluationConfig",
    "ExcludeConfig",
    "ClusterMaximumConfig",
    "ExecutionConfig",
    "GenerationConfig",
    "LossConfig",
    "MachineConfig",
    "MergeConfig",
    "MethodConfig",
    "ModelConfig",
    "NAME",
    "OverridesConfig",
    "PerplexityConfig",
    "PoolConfig",
    "RecoveryConfig",
    "ScheduleConfig",
    "ScoringConfig",
    "SearchConfig",
    "Section",
    "SourceModelConfig",
    "StorageConfig",
    "TargetConfig",
    "TaskConfig",
    "TextConfig",
    "ThroughputConfig",
    "TrainingConfig",
    "WorkerConfig",
    "campaign_schema",
    "holds_credential",
    "load_config",
    "parse_config",
]
