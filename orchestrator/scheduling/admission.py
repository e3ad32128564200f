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

    def holds(self, other: "Room") -> bool:
        """Whether `other` fits in here."""
        return other.cpus <= self.cpus + ROUNDING and other.gpus <= self.gpus + ROUNDING

    def without(self, other: "Room") -> "Room":
        """What is left when `other` is taken, or as much of it as there is."""
        return Room(max(0.0, self.cpus - other.cpus), max(0.0, self.gpus - other.gpus))

    def times(self, number: int) -> "Room":
        """So many of it."""
        return Room(number * self.cpus, number * self.gpus)

    def count(self, other: "Room") -> int:
        """How often `other` goes into this one; more often than anybody asks for if it holds nothing."""
        shares = [
            have / need for have, need in ((self.cpus, other.cpus), (self.gpus, other.gpus)) if need > 0
        ]
        return int(min(shares, default=1e6) + ROUNDING)


@dataclass(frozen=True)
class Need:
    """What a stage needs to begin, and what it holds if it can: a pool begins with one actor."""

    least: Room
    most: Room


@dataclass(frozen=True)
class Places:
    """What there is by now, and what a stage of each kind holds; kinds that are not named hold nothing."""

    room: Callable[[], Room]
    needs: Mapping[str, Need]

    def fit(self, kinds: Iterable[str]) -> bool:
        """Whether stages of these kinds can be at work together, begun in this order.

        The first always can: what the cluster can never give is refused before anything starts.
        A pool takes all that is left, up to what it holds at most.
        """
        needs, left = [self.needs[kind] for kind in kinds if kind in self.needs], self.room()
        for position, need in enumerate(needs):
            if position and not left.holds(need.least):
                return False
            left = left.without(need.most)
        return True

    def trajectories(self) -> int:
        """How many have to be under way for the devices to be held, whatever stage each is in."""
        room, needs = self.room(), [self.needs[kind].most for kind in EVERY_ITERATION if kind in self.needs]
        on_gpus = any(need.gpus for need in needs)
        return max(room.count(need) for need in needs if need.gpus or not on_gpus)


def needs_of(execution: ExecutionConfig) -> dict[str, Need]:
    """What a stage of each kind holds."""
    scoring, generation, evaluation = execution.scoring, execution.generation, execution.evaluation
    training = execution.training
    worker, evaluator = Room(training.cpus, training.gpus), Room(evaluation.cpus, evaluation.gpus)
    return {
        "score": _pool(Room(scoring.cpus, scoring.gpus), scoring.actors),
        "generate": _pool(Room(generation.cpus, generation.gpus), generation.actors),
        "recover": Need(worker.times(training.workers), worker.times(training.workers)),
        "evaluate": _pool(evaluator, evaluation.actors),
        "export": _pool(evaluator, 1),
    }


def _pool(actor: Room, actors: int) -> Need:
    return Need(actor, actor.times(actors))


def devices_held(execution: ExecutionConfig) -> dict[str, float]:
    """Devices that a stage of each kind holds: its GPUs, or its CPUs if the campaign uses no GPU."""
    most = {kind: need.most for kind, need in needs_of(execution).items()}
    on_gpus = any(room.gpus for room in most.values())
    return {kind: room.gpus if on_gpus else room.cpus for kind, room in most.items()}
