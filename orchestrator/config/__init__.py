"""The campaign file: its sections, and how it is read.

What scoring, recovery, generation and evaluation take is declared in `actors.contracts`, and the YAML is
read straight into that; pydantic models are here for what the orchestrator alone decides on.

Imports neither torch nor ray, so that a wrong file is refused in well under a second.
Whether the named models, data, criteria and tasks exist is `orchestrator.planning.planner`'s matter.
"""

from orchestrator.config.campaign import CampaignConfig, ExcludeConfig, SearchConfig, TargetConfig
from orchestrator.config.execution import (
    ActorConfig,
    ClusterMaximumConfig,
    CostConfig,
    ExecutionConfig,
    ExportConfig,
    MachineConfig,
    MlflowConfig,
    PoolConfig,
    StorageConfig,
    TrackingConfig,
    TrainingConfig,
    WandbConfig,
    WorkerConfig,
)
from orchestrator.config.json_schema import campaign_schema
from orchestrator.config.loading import holds_credential, load_config, parse_config
from orchestrator.config.method import (
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    OverridesConfig,
    RecoveryConfig,
    ScheduleConfig,
    SourceModelConfig,
)
from orchestrator.config.paths import absolute_path, with_absolute_paths
from orchestrator.config.section import Section

__all__ = [
    "ActorConfig",
    "CampaignConfig",
    "ClusterMaximumConfig",
    "CostConfig",
    "EvaluationConfig",
    "ExcludeConfig",
    "ExecutionConfig",
    "ExportConfig",
    "MachineConfig",
    "MethodConfig",
    "MlflowConfig",
    "ModelConfig",
    "OverridesConfig",
    "PoolConfig",
    "RecoveryConfig",
    "ScheduleConfig",
    "SearchConfig",
    "Section",
    "SourceModelConfig",
    "StorageConfig",
    "TargetConfig",
    "TrackingConfig",
    "TrainingConfig",
    "WandbConfig",
    "WorkerConfig",
    "absolute_path",
    "campaign_schema",
    "holds_credential",
    "load_config",
    "parse_config",
    "with_absolute_paths",
]
