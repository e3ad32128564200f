"""Where and how wide a campaign runs, where it is kept, who gets its numbers, what it costs."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from actors.contracts import LocalPath
from orchestrator.config.section import Section


class ActorConfig(Section):
    """What one actor or worker holds, all on one node."""

    cpus: float = Field(1.0, gt=0, description="CPUs an actor.")
    gpus: float = Field(
        0.0,
        ge=0,
        description="GPUs an actor; may be a fraction. A model that one cannot hold is placed over all.",
    )
    memory_gb: float | None = Field(None, gt=0, description="GB of a node's memory that are reserved for it.")
    accelerator: str | None = Field(
        None, min_length=1, description="Type of GPU, as Ray names it, e.g. A100 or H100; any if not given."
    )
    labels: dict[str, str] = Field({}, description="Labels that its node must have (`ray start --labels`).")


class PoolConfig(ActorConfig):
    """Actors that share a stage's work, and what each holds."""

    actors: int = Field(
        2, ge=1, description="Actors that share the calibration sequences, the prompts, or the recovery data."
    )


class WorkerConfig(ActorConfig):
    """Actors that share an evaluation's requests, and what each holds."""

    actors: int = Field(1, ge=1, description="Actors that share the requests of the tasks.")


class ExportConfig(ActorConfig):
    """What the process holds that writes a finished model."""


class TrainingConfig(ActorConfig):
    """The workers of one recovery; they start together or not at all, and go on with fewer after a loss."""

    workers: int = Field(1, ge=1, description="Workers that share a batch.")
    deepspeed: Annotated[str | None, LocalPath()] = Field(
        None, description="DeepSpeed JSON file, merged into ours."
    )
    max_failures: int = Field(3, ge=0, description="Lost workers before the recovery is given up.")
    collective_timeout_s: int = Field(
        1800,
        ge=1,
        description="Seconds after which an exchange between workers (NCCL, gloo) that does not end counts "
        "as a lost worker.",
    )
    replacement_timeout_s: float | None = Field(
        300.0,
        gt=0,
        description="Seconds without a replacement of a lost worker after which training goes on with fewer "
        "workers, as many as divide the batch; without it, it waits.",
    )


class ClusterMaximumConfig(Section):
    """Nodes that an autoscaler may start: Ray does not report them while none is up."""

    nodes: int = Field(ge=1, description="Workers at most, of this type.")
    cpus: float = Field(gt=0, description="CPUs of one.")
    gpus: float = Field(0.0, ge=0, description="GPUs of one.")
    memory_gb: float | None = Field(None, gt=0, description="GB of memory of one; not checked if not given.")
    accelerator: str | None = Field(None, min_length=1, description="Type of its GPUs, as Ray names it.")
    labels: dict[str, str] = Field({}, description="Its labels.")


class ExecutionConfig(Section):
    """Where and how wide the work runs. Nothing here changes a result."""

    backend: Literal["ray", "local"] = Field("ray", description="On Ray, or all in this process.")
    scoring: PoolConfig = PoolConfig()
    generation: PoolConfig = PoolConfig()
    teaching: PoolConfig | None = Field(
        None, description="Actors that share the teacher's pass over the recovery data; as scoring if None."
    )
    training: TrainingConfig = TrainingConfig()
    evaluation: WorkerConfig = WorkerConfig()
    export: ExportConfig = ExportConfig()
    overlap_evaluation: bool = Field(
        True,
        description="Evaluate while the next iteration is scored and trained, where there is room for both.",
    )
    max_concurrent_trajectories: int | None = Field(
        None, ge=1, description="Trajectories under way at a time; as many as keep the cluster busy if None."
    )
    cluster_maximum: ClusterMaximumConfig | list[ClusterMaximumConfig] | None = Field(
        None,
        description="What the autoscaler may start, a node type or a list of them; else what is up must do.",
    )
    max_devices: float | None = Field(
        None,
        gt=0,
        description="GPUs (CPUs where no stage uses a GPU) that the campaign holds at most at a time.",
    )
    start_timeout_s: float | None = Field(
        None, gt=0, description="Longest wait for room on the cluster; without it, a stage waits its time."
    )
    stop_timeout_s: float = Field(
        120.0,
        ge=0,
        description="Seconds that stages at work have after a first Ctrl-C or SIGTERM, to finish or to reach "
        "a checkpoint.",
    )
    max_failures: int | None = Field(
        None, ge=1, description="Failed trajectories after which no further stage starts."
    )
    time_limit_s: float | None = Field(
        None, gt=0, description="Seconds after which no further stage starts; counted from every start."
    )
    budget: float | None = Field(
        None,
        gt=0,
        description="Price, by the table of `cost`, after which no further stage starts; of the whole run.",
    )

    @property
    def node_types(self) -> Sequence[ClusterMaximumConfig]:
        """The node types that the autoscaler may start."""
        given = self.cluster_maximum
        return given if isinstance(given, list) else [given] if given else []


class StorageConfig(Section):
    """Where runs are kept."""

    path: str = Field("runs", min_length=1, description="Local directory, NFS, s3:// or gs://.")
    cache: str | None = Field(
        None,
        min_length=1,
        description="Directory or bucket of stages that campaigns share; a stage found there is not "
        "computed. Exports stay with their run.",
    )
    retry_s: float = Field(
        600.0,
        ge=0,
        description="Seconds for which reading and writing are tried again, with growing pauses, while the "
        "storage does not answer.",
    )


class MlflowConfig(Section):
    """An MLflow server. It takes user and password, or a token, from the environment (MLFLOW_TRACKING_…)."""

    tracking_uri: str = Field(min_length=1, description="Address of the server, e.g. http://host:5000.")
    experiment: str | None = Field(
        None, min_length=1, description="Where the runs go; the campaign's name if not given."
    )


class WandbConfig(Section):
    """A project of Weights & Biases. It takes its key from the environment (WANDB_API_KEY) or its login."""

    project: str = Field(min_length=1, description="Where the runs go.")
    entity: str | None = Field(None, min_length=1, description="Whose project; your own if not given.")
    mode: Literal["offline", "online"] = Field(
        "offline", description="Offline, runs are files, which `wandb sync` sends."
    )


class TrackingConfig(Section):
    """Trackers for the numbers of the ledger; each trajectory is a run. Nothing here changes a result."""

    tensorboard: bool = Field(True, description="Write event files into the run's directory `tensorboard`.")
    mlflow: MlflowConfig | None = Field(None, description="An MLflow server, if given.")
    wandb: WandbConfig | None = Field(None, description="Weights & Biases, if given.")


class MachineConfig(Section):
    """What a machine type does and costs, each device of it; what is not given is as in the table."""

    bf16_tflops: float | None = Field(None, gt=0, description="Peak 10¹² FLOP/s in 16 bits.")
    fp32_tflops: float | None = Field(None, gt=0, description="Peak 10¹² FLOP/s in 32 bits.")
    memory_gb: float | None = Field(None, gt=0, description="GB of memory.")
    price_per_hour: float | None = Field(None, ge=0, description="Price of an hour.")


class CostConfig(Section):
    """Assumptions behind the costs that `iterabre plan` shows. Nothing here changes a result."""

    machine: str = Field("A100-80G", description="Machine type that `execution.budget` is counted for.")
    machines: dict[str, MachineConfig] = Field({}, description="Changes of the table of machines.")
    utilisation: float = Field(
        0.35, gt=0, le=1, description="Share of the peak that the work reaches; see also --calibrate."
    )
