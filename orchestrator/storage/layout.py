"""Where everything of a run lies; the only module that builds paths.

<storage.path>/<campaign name>/
    campaign.json                   the configuration the run was started with
    stages/<kind>/<key>/            payload-<attempt>/, then manifest.json, which holds the result
    stages/quarantine/              results that did not match their manifest
    trajectories/<id>.json          how a trajectory ended
    trajectories/<id>.plan.json     what was decided for it
    driver.lock                     the driver that has the run open
    control.json                    what an operator wants: pause, cancellations, priorities
    progress.json                   how far the run is, as the driver last wrote it
    logs/driver.log, workers.log    of the driver; of workers, what belongs to no stage
    logs/<trajectory>/<iteration>-<stage>-<key>.log
    ledger/  superseded/  models/  train/  tune/  report/  tensorboard/
    trackers/<name>.json            what of the ledger was published to a tracker

<storage.cache>/stages/<kind>/<key>/  the same for stages that runs share, and last_use
"""

import os
import re
from pathlib import Path
from typing import Self

from actors.artifacts import cache_entry, join, local_path
from actors.contracts import digest
from actors.errors import RequestError

QUARANTINE = "quarantine"
"""Below `stages`, the directory of results that did not match their manifest."""

FORMER_QUARANTINE = "set-aside"
"""Its name in runs of earlier versions."""

PLAN_SUFFIX = ".plan.json"

CARD, PROVENANCE = "README.md", "iterabre.json"
"""Files beside an exported model."""

RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for what it runs as a job (`ray job submit`, a RayJob of Kubernetes), and for nothing else."""


LONGEST_NAME = 160
"""Characters of a trajectory's id; the name of a part of the ledger adds forty."""


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """Return `name`, its end replaced by a hash of the whole where it is longer than that."""
    return name if len(name) <= longest else f"{name[: longest - 13]}-{digest(name)[:12]}"


def safe_name(name: str) -> str:
    """Return `name` if it can be one path component, on any file system, and nothing else.

    Raises:
        RequestError: it is empty, too long, or has characters such as `/` or a leading dot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}", name):
        raise RequestError(
            f"name {name!r} cannot be used in a path: use 1 to 200 letters, digits and . _ = + -, "
            "beginning with a letter or digit"
        )
    return name


def stage_log(trajectory: str, iteration: int, stage: str, key: str) -> str:
    """Return the name of a stage's log within the directory of logs."""
    return f"{safe_name(trajectory)}/{iteration:03d}-{stage}-{key[:12]}.log"


class RunLayout:
    """The paths of one run, which lies at `uri` (local path, `s3://` or `gs://`)."""

    def __init__(self, uri: str) -> None:
        if "://" in uri and ("?" in uri or "#" in uri):
            raise RequestError(f"storage path {uri!r}: options after '?' are not used; set AWS_ENDPOINT_URL")
        local = local_path(uri)
        self.uri = str(local) if local is not None else uri.rstrip("/")

    @classmethod
    def of_campaign(cls, storage_path: str, name: str) -> Self:
        """Return the run of campaign `name` under the configured `storage.path`.

        Raises:
            RequestError: the path is relative, and this is a job of a Ray cluster.
        """
        return cls(join(cls.of_storage(storage_path), safe_name(name)))

    @staticmethod
    def of_storage(path: str, field: str = "storage.path") -> str:
        """Return the place that `field` names, which is one that lasts.

        Raises:
            RequestError: as `of_campaign`.
        """
        relative = "://" not in path and not os.path.isabs(os.path.expanduser(path))
        if relative and RAY_JOB_VARIABLE in os.environ:
            raise RequestError(
                f"{field} {path!r} is relative, and in a Ray job that is the job's own "
                f"directory ({os.getcwd()}), which Ray deletes: give an absolute path that every node sees "
                f"(NFS), or s3:// or gs://, e.g. --set {field}=s3://bucket/runs"
            )
        return path

    @property
    def run_manifest_uri(self) -> str:
        """The configuration and versions the run was started with, as JSON."""
        return join(self.uri, "campaign.json")

    @property
    def ledger_uri(self) -> str:
        """Directory of Parquet parts."""
        return join(self.uri, "ledger")

    @property
    def superseded_uri(self) -> str:
        """Directory of the ledger's parts that other stages took the place of."""
        return join(self.uri, "superseded")

    @property
    def report_uri(self) -> str:
        """Directory of the report."""
        return join(self.uri, "report")

    @property
    def usage_uri(self) -> str:
        """Directory of what each start of the driver has used of the cluster, as JSON."""
        return join(self.uri, "usage")

    @property
    def tune_uri(self) -> str:
        """Ray Tune's directory: a cache of trial states, never the truth."""
        return join(self.uri, "tune")

    @property
    def control_uri(self) -> str:
        """The file of an operator's wishes for the run, as JSON."""
        return join(self.uri, "control.json")

    @property
    def progress_uri(self) -> str:
        """The file of the run's progress, as JSON."""
        return join(self.uri, "progress.json")

    @property
    def logs_uri(self) -> str:
        """Directory of the logs: of driver and workers, and one a trajectory for those of its stages."""
        return join(self.uri, "logs")

    @property
    def logs_dir(self) -> Path:
        """Directory that logs are written to; when the run lies in an object store, one of this node,
        from which they are uploaded to `logs_uri`."""
        local = local_path(self.uri)
        return local / "logs" if local is not None else cache_entry("logs", digest(self.uri)[:16])

    def train_uri(self, key: str) -> str:
        """Return the directory of checkpoints of the training behind the recovery stage `key`."""
        return join(self.uri, "train", safe_name(key))

    def parts_uri(self, key: str) -> str:
        """Return the directory of what the evaluation `key` has measured, until it is finished."""
        return join(self.uri, "parts", safe_name(key))

    def models_uri(self, trajectory: str, num_left: int) -> str:
        """Return the directory of a trajectory's exported checkpoint with so many layers."""
        return join(self.all_models_uri, safe_name(trajectory), f"{num_left}-layers")

    @property
    def all_models_uri(self) -> str:
        """Directory of the exported checkpoints, one a trajectory."""
        return join(self.uri, "models")

    @property
    def trajectories_uri(self) -> str:
        """Directory of the trajectories' plans and states."""
        return join(self.uri, "trajectories")

    def trajectory_status_uri(self, trajectory: str) -> str:
        """Return the file of how a trajectory ended, as JSON."""
        return join(self.trajectories_uri, safe_name(trajectory) + ".json")

    def trajectory_plan_uri(self, trajectory: str) -> str:
        """Return the file of what was decided for a trajectory, as JSON."""
        return join(self.trajectories_uri, safe_name(trajectory) + PLAN_SUFFIX)

    def tensorboard_uri(self, trajectory: str) -> str:
        """Return the directory of a trajectory's event files."""
        return join(self.all_tensorboard_uri, safe_name(trajectory))

    @property
    def all_tensorboard_uri(self) -> str:
        """Directory of the event files, one a trajectory."""
        return join(self.uri, "tensorboard")

    def published_uri(self, tracker: str) -> str:
        """Return the file of the ledger's parts that were published to a tracker, as JSON."""
        return join(self.uri, "trackers", safe_name(tracker) + ".json")

    @property
    def lock_uri(self) -> str:
        """The driver that has the run open, as JSON."""
        return join(self.uri, "driver.lock")

    def stage_uri(self, kind: str, key: str) -> str:
        """Return the directory of one stage."""
        return join(self.uri, "stages", safe_name(kind), safe_name(key))

    def payload_uri(self, kind: str, key: str, attempt: int) -> str:
        """Return the directory of an attempt's files; attempts never write to one another's."""
        return join(self.stage_uri(kind, key), f"payload-{attempt}")

    def quarantine_uri(self, stage: str) -> str:
        """Return the directory to which a damaged stage is moved, under the name `stage`."""
        return join(self.uri, "stages", QUARANTINE, stage)
