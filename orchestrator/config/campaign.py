"""The campaign file as a whole: its grid, and where and how wide it runs."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.config.sections import EvaluationConfig, MethodConfig, ModelConfig, Name, Section


class TargetConfig(Section):
    """A depth to stop at: exactly one of `layers` and `fraction`."""

    layers: int | None = Field(None, description="Layers to keep.")
    fraction: float | None = Field(None, gt=0, lt=1, description="Share of the layers to remove.")

    @model_validator(mode="after")
    def _one_measure(self) -> "TargetConfig":
        if (self.layers is None) == (self.fraction is None):
            raise ValueError("give exactly one of `layers` and `fraction`")
        return self


class PoolConfig(Section):
    """Actors that share a stage's work, and what each holds."""

    actors: int = Field(2, ge=1, description="Actors that share the calibration sequences.")
    cpus: float = Field(1.0, gt=0, description="CPUs an actor.")
    gpus: float = Field(0.0, ge=0, description="GPUs an actor; may be a fraction.")


class WorkerConfig(Section):
    """What one evaluation or export holds."""

    cpus: float = Field(1.0, gt=0, description="CPUs an evaluation.")
    gpus: float = Field(0.0, ge=0, description="GPUs an evaluation; may be a fraction.")


class TrainingConfig(Section):
    """The workers of one recovery; they start together or not at all."""

    workers: int = Field(1, ge=1, description="Workers that share a batch.")
    cpus: float = Field(1.0, gt=0, description="CPUs a worker.")
    gpus: float = Field(0.0, ge=0, description="GPUs a worker.")
    deepspeed: str | None = Field(None, description="DeepSpeed JSON file, merged into ours.")
    max_failures: int = Field(3, ge=0, description="Lost workers before the recovery is given up.")


class ExecutionConfig(Section):
    """Where and how wide the work runs. Nothing here changes a result."""

    backend: Literal["ray", "local"] = Field("ray", description="On Ray, or all in this process.")
    scoring: PoolConfig = PoolConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: WorkerConfig = WorkerConfig()
    max_concurrent_trajectories: int = Field(1, ge=1, description="Trajectories that run at a time.")
    start_timeout_s: float = Field(
        600.0, gt=0, description="Longest wait for the cluster to give what a stage asks for."
    )


class StorageConfig(Section):
    """Where runs are kept."""

    path: str = Field("runs", min_length=1, description="Local directory, NFS, s3:// or gs://.")


class CampaignConfig(Section):
    """One campaign: models × methods × seeds, with stops at the targets."""

    name: Name = Field(description="Name of the run; its directory under storage.path.")
    models: list[ModelConfig] = Field(min_length=1)
    methods: list[MethodConfig] = Field(min_length=1)
    targets: list[TargetConfig] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1, description="Every model and method runs once a seed.")
    evaluation: EvaluationConfig = EvaluationConfig()
    execution: ExecutionConfig = ExecutionConfig()
    storage: StorageConfig = StorageConfig()

    @field_validator("seeds")
    @classmethod
    def _seeds_in_range(cls, seeds: list[int]) -> list[int]:
        if any(not 0 <= seed < 2**31 for seed in seeds):
            raise ValueError("a seed lies between 0 and 2147483647")
        return seeds

    @model_validator(mode="after")
    def _unique_names(self) -> "CampaignConfig":
        for kind, names in (
            ("model id", [m.id for m in self.models]),
            ("method name", [m.name for m in self.methods]),
            ("seed", [str(s) for s in self.seeds]),
            ("evaluation.perplexity name", [p.name for p in self.evaluation.perplexity]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{kind} {sorted(twice)[0]!r} stands there twice")
        return self
