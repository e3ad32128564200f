"""Places on the cluster: how much of it a stage of each kind holds, and how many stages it takes at a time.

What waits for a place waits here rather than in Ray, where a request would run into its
time-out and could not be overtaken.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from orchestrator.config import ExecutionConfig

EVERY_ITERATION = ("score", "recover", "evaluate")
"""The stages that a trajectory passes again and again."""

ROUNDING = 1e-6
"""Fractions of a GPU do not add up exactly."""


@dataclass(frozen=True)
class Room:
    """Processors and GPUs: what a cluster has, or what a stage holds of it."""

    cpus: float
    gpus: float

    def times(self, other: "Room") -> int:
        """How many times `other` goes into this one; more often than anybody asks for if it holds nothing."""
        shares = [
            have / need for have, need in ((self.cpus, other.cpus), (self.gpus, other.gpus)) if need > 0
        ]
        return int(min(shares, default=1e6) + ROUNDING)


@dataclass(frozen=True)
class Places:
    """What there is by now, and what a stage of each kind holds; kinds that are not named hold nothing."""

    room: Callable[[], Room]
    needs: Mapping[str, Room]

    def fit(self, kinds: Iterable[str]) -> bool:
        """Whether stages of these kinds have their places at the same time.

        One alone always has: what the cluster can never give is refused before anything starts,
        and a pool begins with as many actors as there is room for.
        """
        needs = [self.needs[kind] for kind in kinds if kind in self.needs]
        if len(needs) <= 1:
            return True
        room, cpus, gpus = self.room(), sum(need.cpus for need in needs), sum(need.gpus for need in needs)
        return cpus <= room.cpus + ROUNDING and gpus <= room.gpus + ROUNDING

    def trajectories(self) -> int:
        """How many have to be under way for the devices to be held, whatever stage each is in."""
        room, needs = self.room(), [self.needs[kind] for kind in EVERY_ITERATION if kind in self.needs]
        on_gpus = any(need.gpus for need in needs)
        return max(room.times(need) for need in needs if need.gpus or not on_gpus)


def needs_of(execution: ExecutionConfig) -> dict[str, Room]:
    """What a stage of each kind holds, at its widest."""
    scoring, generation, evaluation = execution.scoring, execution.generation, execution.evaluation
    training = execution.training
    return {
        "score": Room(scoring.actors * scoring.cpus, scoring.actors * scoring.gpus),
        "generate": Room(generation.actors * generation.cpus, generation.actors * generation.gpus),
        "recover": Room(training.workers * training.cpus, training.workers * training.gpus),
        "evaluate": Room(evaluation.actors * evaluation.cpus, evaluation.actors * evaluation.gpus),
        "export": Room(evaluation.cpus, evaluation.gpus),
    }


def devices_held(execution: ExecutionConfig) -> dict[str, float]:
    """Devices that a stage of each kind holds: its GPUs, or its CPUs if the campaign uses no GPU."""
    needs = needs_of(execution)
    on_gpus = any(need.gpus for need in needs.values())
    return {kind: need.gpus if on_gpus else need.cpus for kind, need in needs.items()}
