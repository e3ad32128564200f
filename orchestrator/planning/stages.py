"""The stages that a plan comes to, as a dry run of its trajectories finds them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlannedStage:
    """A stage as a trajectory will request it; `layers` is the depth of the model it works on."""

    kind: str
    key: str
    iteration: int
    layers: int
    spec: Any
    finished: bool


@dataclass(frozen=True)
class StageCounts:
    """How often a campaign's stages are requested.

    `planned`: by the trajectories, each with its targets as stops.
    `distinct`: of those, the ones that differ; the others are shared.
    `finished`: of the distinct ones, those that the store holds.
    """

    planned: int
    distinct: int
    finished: int

    @property
    def shared(self) -> int:
        return self.planned - self.distinct

    @property
    def to_run(self) -> int:
        return self.distinct - self.finished


def distinct_stages(stages: Iterable[PlannedStage]) -> dict[tuple[str, str], PlannedStage]:
    """Return every stage once, by kind and key; the first request stands for all."""
    found: dict[tuple[str, str], PlannedStage] = {}
    for stage in stages:
        found.setdefault((stage.kind, stage.key), stage)
    return found


def count_stages(stages: Iterable[PlannedStage]) -> StageCounts:
    """Count the stages of a campaign, given those of all its trajectories."""
    planned = list(stages)
    distinct = distinct_stages(planned).values()
    return StageCounts(len(planned), len(distinct), sum(stage.finished for stage in distinct))
