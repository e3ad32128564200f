"""MLflow: a run on its server, or in its local store, for each trajectory."""

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from orchestrator.config import CampaignConfig
from orchestrator.errors import RequestError
from orchestrator.storage.stage_store import Store
from orchestrator.tracking.publisher import Batch, State

METRICS_A_REQUEST = 1000
PARAMETERS_A_REQUEST = 100
"""MLflow takes no more in one request."""


class Mlflow:
    """A run of MLflow for each trajectory, found again by a tag."""

    keeps = True
    TAG = "iterabre.trajectory"
    STATUS: Mapping[State, str] = {"done": "FINISHED", "failed": "FAILED", "unfinished": "KILLED"}

    def __init__(self, config: CampaignConfig, _store: Store):
        # By its own defaults, MLflow tries for many minutes to reach a server that is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        section = config.tracking.mlflow
        assert section is not None, "used only with its section"
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
        self._runs: dict[str, str] = {}

    def write(self, batch: Batch) -> None:
        """Log the points to the trajectory's run."""
        from mlflow.entities import Metric

        if batch.trajectory not in self._runs:
            self._runs[batch.trajectory] = self._open(batch)
        run = self._runs[batch.trajectory]
        metrics = [
            Metric(point.name, point.value, int(point.when.timestamp() * 1000), point.step)
            for point in batch.points
        ]
        for start in range(0, len(metrics), METRICS_A_REQUEST):
            self._client.log_batch(run, metrics=metrics[start : start + METRICS_A_REQUEST])

    def close(self, states: Mapping[str, State]) -> None:
        """Set the status of every run."""
        for trajectory, run in self._runs.items():
            self._client.set_terminated(run, self.STATUS[states[trajectory]])

    def _open(self, batch: Batch) -> str:
        """Return the id of the trajectory's run, which an earlier driver may have made."""
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._experiment)
        before = self._client.search_runs(
            [experiment], f"tags.`{self.TAG}` = '{batch.run_id}'", max_results=1
        )
        if before:
            run = str(before[0].info.run_id)
            self._client.update_run(run, "RUNNING")
            return run
        tags = {self.TAG: batch.run_id, "iterabre.campaign": self._campaign}
        run = str(self._client.create_run(experiment, tags=tags, run_name=batch.trajectory).info.run_id)
        given = [Param(name, str(value)) for name, value in batch.parameters.items()]
        for start in range(0, len(given), PARAMETERS_A_REQUEST):
            self._client.log_batch(run, params=given[start : start + PARAMETERS_A_REQUEST])
        return run
