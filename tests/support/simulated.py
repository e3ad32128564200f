"""A backend whose stages only sleep, on made-up devices: for what concerns trials and not models."""

import os
import random
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ray

from actors.artifacts import publish
from actors.contracts import (
    ActorPoolSpec,
    EvaluationResult,
    EvaluationSpec,
    ExportResult,
    ExportSpec,
    Metric,
    Progress,
    RecoveryResult,
    RecoverySpec,
    ScoreResult,
    ScoreSpec,
    no_progress,
)
from actors.ray_pool import ActorPool, result_of
from orchestrator.config import ExecutionConfig
from orchestrator.storage.stage_store import Store

NUM_LAYERS = 4


@dataclass(frozen=True)
class Simulation:
    """How long stages of each kind sleep, on how many devices (a Ray resource), and where each is noted.

    Times are spread as a log-normal of that sigma, the same for the same stage. `metric` is what
    evaluation measures; it is worse the more layers are gone and the higher the learning rate was.
    With `cpus`, a stage sleeps in a pool of one actor that holds them.
    """

    seconds: Mapping[str, float]
    notes: Path
    device: str = ""
    devices: Mapping[str, float] = field(default_factory=dict)
    num_layers: int = NUM_LAYERS
    metric: str = "fox/token_perplexity"
    spread: float = 0.0
    cpus: float = 0.0

    def __call__(self, _execution: ExecutionConfig, _store: Store) -> "SimulatedBackend":
        return SimulatedBackend(self)


class SimulatedBackend:
    """Stages that sleep and leave a note each time they are computed."""

    def __init__(self, simulation: Simulation):
        self._simulation = simulation

    def score(self, spec: ScoreSpec, progress: Progress) -> ScoreResult:
        self._work("score", spec, progress)
        layers = spec.model.kept(self._simulation.num_layers)
        return ScoreResult(layers, tuple(map(float, layers)), layers[::-1], 1, 1, 0)

    def recover(self, spec: RecoverySpec, uri: str, key: str, progress: Progress) -> RecoveryResult:
        self._work("recover", spec, progress)
        directory = self._simulation.notes / f"adapter-{uuid.uuid4().hex}"
        directory.mkdir()
        # What evaluation reads back: the simulated quality of a recovery is its learning rate.
        (directory / "rate.txt").write_text(str(spec.learning_rate))
        return RecoveryResult(publish(directory, uri), (), 0, 0)

    def evaluate(self, spec: EvaluationSpec, uri: str, key: str, progress: Progress) -> EvaluationResult:
        self._work("evaluate", spec, progress)
        rates = [float(Path(adapter.uri, "rate.txt").read_text()) for adapter in spec.model.adapters]
        value = 10.0 + len(spec.model.dropped) + 100 * max(rates, default=0.0)
        return EvaluationResult((Metric(self._simulation.metric, value),), 1)

    def export(self, spec: ExportSpec, uri: str, progress: Progress) -> ExportResult:
        self._work("export", spec, progress)
        directory = self._simulation.notes / f"export-{uuid.uuid4().hex}"
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        return ExportResult(publish(directory, uri), self._simulation.num_layers - len(spec.model.dropped), 1)

    def _work(self, kind: str, spec: Any, progress: Progress = no_progress) -> None:
        simulation, asked = self._simulation, time.time()
        took = simulation.seconds[kind] * random.Random(repr(spec)).lognormvariate(0, simulation.spread)
        if simulation.device:
            amount = {simulation.device: simulation.devices[kind]}
            ray.get(_sleeper().options(resources=amount).remote(took))
        elif simulation.cpus:
            pool = ActorPoolSpec(1, simulation.cpus, 0)
            with ActorPool(pool, Sleeper, setting=kind, progress=progress) as actors:
                result_of(actors.first.work.remote(took))
        else:
            time.sleep(took)
        note = simulation.notes / f"{kind}-{uuid.uuid4().hex}.txt"
        note.write_text(f"{os.getpid()} {asked} {time.time()} {took}")


class Sleeper:
    """An actor whose work is to sleep."""

    def work(self, seconds: float) -> None:
        """Sleep so long."""
        time.sleep(seconds)


@cache
def _sleeper() -> Any:
    """A task that sleeps; made here, so that it travels by value and its process imports nothing for it."""

    def sleep(seconds: float) -> None:
        time.sleep(seconds)

    return ray.remote(num_cpus=0, scheduling_strategy="DEFAULT", max_retries=0)(sleep)
