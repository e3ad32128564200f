"""A pool of actors."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ActorPoolSpec:
    """Up to `actors` actors, and what each holds.

    Attributes:
        start_timeout_s: longest wait for the first one; None waits until there is room.
        memory_bytes: of its node's memory, reserved.
        accelerator: type of its GPUs, as Ray names it.
        labels: what the labels of its node must be.
        packages: requirements of an environment of their own, which Ray makes by uv on each node;
            none for that of the cluster.
    """

    actors: int
    cpus: float
    gpus: float
    start_timeout_s: float | None = None
    memory_bytes: float = 0.0
    accelerator: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    packages: tuple[str, ...] = ()
