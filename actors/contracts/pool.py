"""A pool of actors."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ActorPoolSpec:
    """Up to `actors` actors with `cpus` and `gpus` each; the first must start within `start_timeout_s`."""

    actors: int
    cpus: float
    gpus: float
    start_timeout_s: float = 600.0
