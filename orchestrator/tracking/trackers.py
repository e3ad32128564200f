"""The trackers that a campaign can tell its numbers; each imports its package when it is asked for."""

import importlib.util
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from actors.artifacts import join, write_bytes
from actors.contracts import digest
from orchestrator.config import CampaignConfig, WandbConfig
from orchestrator.errors import RequestError
from orchestrator.storage.stage_store import Store
from orchestrator.tracking.publisher import Batch, State, Tracker

METRICS_A_REQUEST = 1000
PARAMETERS_A_REQUEST = 100
"""MLflow takes no more in one request."""


class TensorBoard:
    """An event file for every batch, in the trajectory's directory; a batch that comes twice replaces it.

    Files are whole when they appear and are never written on, so that they can lie in an object store.
    """

    failures: tuple[type[Exception], ...] = ()
    keeps = True

    def __init__(self, _config: CampaignConfig, store: Store):
        self._store = store

    def write(self, batch: Batch) -> None:
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        with tempfile.TemporaryDirectory() as directory:
            with SummaryWriter(directory) as writer:
                _, session, _ = hparams(dict(batch.parameters), {})
                writer.file_writer.add_summary(session)
                for point in batch.points:
                    writer.add_scalar(point.name, point.value, point.step, point.when.timestamp())
            (events,) = Path(directory).iterdir()
            home = self._store.tensorboard_uri(batch.trajectory)
            # TensorBoard reads a directory's files in the order of their names.
            write_bytes(join(home, f"events.out.tfevents.{batch.number:010d}"), events.read_bytes())

    def close(self, _states: Mapping[str, State]) -> None:
        pass


class Mlflow:
    """A run of MLflow for each trajectory, found again by a tag."""

    keeps = True
    TAG = "iterabre.trajectory"
    STATUS: Mapping[State, str] = {"done": "FINISHED", "failed": "FAILED", "unfinished": "KILLED"}

    def __init__(self, config: CampaignConfig, store: Store):
        # By its own defaults, MLflow tries for many minutes to reach a server that is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        section = config.tracking.mlflow
        assert section is not None, "asked for only with its section"
        self.failures: tuple[type[Exception], ...] = (MlflowException,)
        try:
            self._client = MlflowClient(section.tracking_uri)
            if urlsplit(section.tracking_uri).scheme not in ("http", "https", "databricks"):
                # Whether files and data bases of this machine will do depends on what is installed.
                self._client.search_experiments(max_results=1)
        except MlflowException as error:
            reason = " ".join(str(error).split())
            raise RequestError(
                f"tracking.mlflow.tracking_uri {section.tracking_uri!r} cannot be used: {reason}"
            ) from error
        self._campaign = config.name
        self._experiment = section.experiment or config.name
        self._store = store
        self._runs: dict[str, str] = {}

    def write(self, batch: Batch) -> None:
        from mlflow.entities import Metric

        run = self._runs.get(batch.trajectory) or self._open(batch)
        self._runs[batch.trajectory] = run
        metrics = [
            Metric(point.name, point.value, int(point.when.timestamp() * 1000), point.step)
            for point in batch.points
        ]
        for start in range(0, len(metrics), METRICS_A_REQUEST):
            self._client.log_batch(run, metrics=metrics[start : start + METRICS_A_REQUEST])

    def close(self, states: Mapping[str, State]) -> None:
        for trajectory, run in self._runs.items():
            self._client.set_terminated(run, self.STATUS[states[trajectory]])

    def _open(self, batch: Batch) -> str:
        """The trajectory's run, which an earlier driver may have made."""
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._experiment)
        identity = _identity(self._store, batch.trajectory)
        before = self._client.search_runs([experiment], f"tags.`{self.TAG}` = '{identity}'", max_results=1)
        if before:
            run = str(before[0].info.run_id)
            self._client.update_run(run, "RUNNING")
            return run
        tags = {self.TAG: identity, "iterabre.campaign": self._campaign}
        run = str(self._client.create_run(experiment, tags=tags, run_name=batch.trajectory).info.run_id)
        given = [Param(name, str(value)) for name, value in batch.parameters.items()]
        for start in range(0, len(given), PARAMETERS_A_REQUEST):
            self._client.log_batch(run, params=given[start : start + PARAMETERS_A_REQUEST])
        return run


class Wandb:
    """A run of Weights & Biases for each trajectory; its axes are `iteration` and `training_step`."""

    def __init__(self, config: CampaignConfig, store: Store):
        import wandb

        section = config.tracking.wandb
        assert section is not None, "asked for only with its section"
        if section.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RequestError(
                "tracking.wandb.mode online needs a key: set WANDB_API_KEY, log in once with `wandb login`, "
                "or use mode: offline"
            )
        self.failures: tuple[type[Exception], ...] = (wandb.Error,)
        logging.getLogger("wandb").setLevel(logging.WARNING)
        # Every driver writes offline files of its own, and one that is sent replaces those sent before.
        self.keeps = section.mode == "online"
        self._section: WandbConfig = section
        self._campaign = config.name
        self._store = store
        self._runs: dict[str, Any] = {}

    def write(self, batch: Batch) -> None:
        run = self._runs.get(batch.trajectory) or self._open(batch)
        self._runs[batch.trajectory] = run
        together: defaultdict[tuple[str, int], dict[str, float]] = defaultdict(dict)
        for point in batch.points:
            axis = "training_step" if point.in_training else "iteration"
            together[axis, point.step][point.name] = point.value
        for (axis, step), values in sorted(together.items()):
            run.log({axis: step, **values})
            for name in values:
                run.define_metric(name, step_metric=axis)

    def close(self, states: Mapping[str, State]) -> None:
        for trajectory, run in self._runs.items():
            run.finish(exit_code=0 if states[trajectory] == "done" else 1)

    def _open(self, batch: Batch) -> Any:
        import wandb

        return wandb.init(
            project=self._section.project,
            entity=self._section.entity,
            mode=self._section.mode,
            id=_identity(self._store, batch.trajectory),
            name=batch.trajectory,
            group=self._campaign,
            config=dict(batch.parameters),
            dir=self._store.logs_dir,
            resume="allow",
            reinit="create_new",
            # Numbers of the ledger only: neither this process's output, code and machine nor its packages.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )


@dataclass(frozen=True)
class TrackerKind:
    """A tracker, the Python package it needs, and what to install for that."""

    make: Callable[[CampaignConfig, Store], Tracker]
    package: str
    install: str


TRACKERS: Mapping[str, TrackerKind] = {
    "tensorboard": TrackerKind(TensorBoard, "tensorboardX", "tensorboardX"),
    "mlflow": TrackerKind(Mlflow, "mlflow", "mlflow-skinny"),
    "wandb": TrackerKind(Wandb, "wandb", "wandb"),
}
"""Every tracker, by the field of `tracking` that switches it on."""


def make_trackers(config: CampaignConfig, store: Store) -> dict[str, Tracker]:
    """The trackers that the campaign asks for; no server need answer yet.

    Raises:
        RequestError: a tracker's package is not installed, or lacks what it needs here.
    """
    trackers: dict[str, Tracker] = {}
    for name, kind in TRACKERS.items():
        if not getattr(config.tracking, name):
            continue
        if importlib.util.find_spec(kind.package) is None:
            raise RequestError(
                f"tracking.{name} needs the Python package {kind.package!r}, which is not installed: "
                f"pip install {kind.install}, or leave tracking.{name} out"
            )
        trackers[name] = kind.make(config, store)
    return trackers


def _identity(store: Store, trajectory: str) -> str:
    """What a trajectory's run is found by: the same after a resume, another in another directory."""
    return digest([store.uri, trajectory])[:16]
