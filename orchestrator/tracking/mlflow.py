"""MLflow: a run of the campaign on its server, or in its local store, and one in it for each trajectory."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from actors.contracts import digest
from orchestrator.config import CampaignConfig
from orchestrator.errors import RequestError
from orchestrator.storage.stage_store import Store
from orchestrator.tracking.publisher import Batch, State

METRICS_A_REQUEST = 1000
PARAMETERS_A_REQUEST = 100
"""MLflow takes no more in one request."""


class Mlflow:
    """A run of MLflow for the campaign, and in it one for each trajectory, found again by their tags."""

    keeps = True
    CAMPAIGN_TAG, TAG = "iterabre.run", "iterabre.trajectory"
    PARENT_TAG = "mlflow.parentRunId"
    STATUS: Mapping[State, str] = {"done": "FINISHED", "failed": "FAILED", "unfinished": "KILLED"}

    def __init__(self, config: CampaignConfig, store: Store):
        # By its own defaults, MLflow tries for many minutes to reach a server that is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        section = config.tracking.mlflow
        assert section is not None, "used only with its section"
        self.failures: tuple[type[Exception], ...] = (MlflowException,)
        self._uri = section.tracking_uri
        scheme = urlsplit(self._uri).scheme
        self._is_server = scheme in ("http", "https")
        try:
            self._client = MlflowClient(self._uri)
            if not self._is_server and scheme != "databricks":
                # Whether files and data bases of this machine will do depends on what is installed.
                self._client.search_experiments(max_results=1)
        except MlflowException as error:
            reason = " ".join(str(error).split())
            raise RequestError(
                f"tracking.mlflow.tracking_uri {section.tracking_uri!r} cannot be used: {reason}"
            ) from error
        self._campaign = config.name
        self._experiment = section.experiment or config.name
        self._config_params = {
            "models": ", ".join(model.id for model in config.models),
            "methods": ", ".join(method.name for method in config.methods),
            "seeds": ", ".join(map(str, config.seeds)),
        }
        self._run_id = digest([store.uri])[:16]
        self._parent: tuple[str, str] | None = None
        self._runs: dict[str, str] = {}

    def open(self) -> str:
        """Open the campaign's run; return its page on the server, or the command that shows it."""
        experiment, run = self._campaign_run()
        self._client.update_run(run, "RUNNING")
        if self._is_server:
            return f"{self._uri.rstrip('/')}/#/experiments/{experiment}/runs/{run}"
        return f"mlflow ui --backend-store-uri {self._uri}  (experiment {self._experiment}, run {run})"

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
        ends = set(states.values())
        whole: State = "failed" if "failed" in ends else "unfinished" if "unfinished" in ends else "done"
        self._client.set_terminated(self._campaign_run()[1], self.STATUS[whole])

    def attach(self, files: Mapping[str, bytes]) -> None:
        """Log the files as artifacts of the campaign's run."""
        with tempfile.TemporaryDirectory() as directory:
            for name, content in files.items():
                file = Path(directory, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            self._client.log_artifacts(self._campaign_run()[1], directory)

    def _campaign_run(self) -> tuple[str, str]:
        """Return the ids of the experiment and of the campaign's run, made if they are not there."""
        if self._parent is None:
            found = self._client.get_experiment_by_name(self._experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(self._experiment)
            tags = {self.CAMPAIGN_TAG: self._run_id, "iterabre.campaign": self._campaign}
            run = self._find(experiment, self.CAMPAIGN_TAG, self._run_id)
            if run is None:
                run = self._create(experiment, self._campaign, tags, self._config_params)
            self._parent = (experiment, run)
        return self._parent

    def _open(self, batch: Batch) -> str:
        """Return the id of the trajectory's run, which an earlier driver may have made."""
        experiment, parent = self._campaign_run()
        if (run := self._find(experiment, self.TAG, batch.run_id)) is not None:
            self._client.set_tag(run, self.PARENT_TAG, parent)  # earlier versions made no parent
            self._client.update_run(run, "RUNNING")
            return run
        tags = {self.TAG: batch.run_id, "iterabre.campaign": self._campaign, self.PARENT_TAG: parent}
        return self._create(experiment, batch.trajectory, tags, batch.parameters)

    def _find(self, experiment: str, tag: str, value: str) -> str | None:
        found = self._client.search_runs([experiment], f"tags.`{tag}` = '{value}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _create(
        self, experiment: str, name: str, tags: Mapping[str, str], parameters: Mapping[str, object]
    ) -> str:
        from mlflow.entities import Param

        run = str(self._client.create_run(experiment, tags=dict(tags), run_name=name).info.run_id)
        given = [Param(name, str(value)) for name, value in parameters.items()]
        for start in range(0, len(given), PARAMETERS_A_REQUEST):
            self._client.log_batch(run, params=given[start : start + PARAMETERS_A_REQUEST])
        return run
