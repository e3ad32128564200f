"""Content-addressed stage results of one run; the only module that builds paths.

    <storage.path>/<campaign name>/
        campaign.json                   the configuration the run was started with
        stages/<kind>/<key>/            payload-<attempt>/, result.json, then manifest.json
        stages/set-aside/               results that did not match their manifest
        trajectories/<id>.json          how a trajectory ended
        driver.lock                     who has the run open
        ledger/  models/  train/  tune/  report/  logs/  tensorboard/
        trackers/<name>.json            what of the ledger a tracker was told

A stage's key is a hash of everything its result depends on, so a result found
under its key is the result. No manifest, no result.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

from pyarrow.fs import LocalFileSystem
from pydantic import TypeAdapter

from actors.artifacts import (
    cache_entry,
    explained,
    filesystem,
    join,
    list_files,
    local_path,
    read_bytes,
    sha256_of,
    without_empty_directories,
    write_bytes,
)
from actors.contracts import ArtifactRef, FileRef, digest
from actors.errors import RequestError, WorkError
from orchestrator.errors import CorruptStageError

log = logging.getLogger(__name__)

FORMAT = 1
RUN_PREFIX = "run:/"
SET_ASIDE = "set-aside"
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for what it runs as a job (`ray job submit`, a RayJob of Kubernetes), and for nothing else."""

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class StoredStage(Generic[ResultT]):
    """A finished stage: its result, its payload, and how it came to be."""

    kind: str
    key: str
    result: ResultT
    artifact: ArtifactRef | None
    inputs: dict[str, Any]
    seconds: float
    created_at: str
    host: str
    versions: Mapping[str, str]


def safe_name(name: str) -> str:
    """`name` if it can be one path component, on any file system, and nothing else.

    Raises:
        RequestError: it is empty, too long, or has characters such as `/` or a leading dot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}", name):
        raise RequestError(
            f"name {name!r} cannot be used in a path: use 1 to 200 letters, digits and . _ = + -, "
            "beginning with a letter or digit"
        )
    return name


@cache
def installed_versions() -> Mapping[str, str]:
    """Versions of the packages that decide the numbers, of those installed when first asked."""
    found = {}
    for package in ("iterabre", "torch", "transformers", "peft", "deepspeed", "lm-eval", "ray", "pyarrow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Store:
    """All that one run leaves behind, at `uri` (local path, `s3://` or `gs://`)."""

    def __init__(self, uri: str) -> None:
        if "://" in uri and ("?" in uri or "#" in uri):
            raise RequestError(f"storage path {uri!r}: options after '?' are not used; set AWS_ENDPOINT_URL")
        local = local_path(uri)
        self.uri = str(local) if local is not None else uri.rstrip("/")

    @classmethod
    def of_campaign(cls, storage_path: str, name: str) -> "Store":
        """The store of campaign `name` under the configured `storage.path`.

        Raises:
            RequestError: the path is relative, and this is a job of a Ray cluster.
        """
        relative = "://" not in storage_path and not os.path.isabs(os.path.expanduser(storage_path))
        if relative and RAY_JOB_VARIABLE in os.environ:
            raise RequestError(
                f"storage.path {storage_path!r} is relative, and in a Ray job that is the job's own "
                f"directory ({os.getcwd()}), which Ray deletes: give an absolute path that every node sees "
                "(NFS), or s3:// or gs://, e.g. --set storage.path=s3://bucket/runs"
            )
        return cls(join(storage_path, safe_name(name)))

    @property
    def run_file_uri(self) -> str:
        """The configuration and versions the run was started with, as JSON."""
        return join(self.uri, "campaign.json")

    @property
    def ledger_uri(self) -> str:
        """Directory of Parquet parts."""
        return join(self.uri, "ledger")

    @property
    def report_uri(self) -> str:
        """Directory of the report."""
        return join(self.uri, "report")

    @property
    def tune_uri(self) -> str:
        """Ray Tune's directory: a cache of trial states, never the truth."""
        return join(self.uri, "tune")

    @property
    def logs_dir(self) -> Path:
        """Directory for log files; on this node when the run lies in an object store."""
        local = local_path(self.uri)
        return local / "logs" if local is not None else cache_entry("logs", digest(self.uri)[:16])

    def train_uri(self, key: str) -> str:
        """Checkpoints of the training behind the recovery stage `key`."""
        return join(self.uri, "train", safe_name(key))

    def models_uri(self, trajectory: str, num_left: int, unit: str = "layers") -> str:
        """The exported checkpoint of a trajectory with so many layers, or sub-blocks, left."""
        return join(self.uri, "models", safe_name(trajectory), f"{num_left}-{unit}")

    @property
    def outcomes_uri(self) -> str:
        """Directory of the trajectories' outcomes."""
        return join(self.uri, "trajectories")

    def outcome_uri(self, trajectory: str) -> str:
        """How a trajectory ended, as JSON."""
        return join(self.outcomes_uri, safe_name(trajectory) + ".json")

    def tensorboard_uri(self, trajectory: str) -> str:
        """Event files of a trajectory."""
        return join(self.uri, "tensorboard", safe_name(trajectory))

    def published_uri(self, tracker: str) -> str:
        """The parts of the ledger that a tracker was told, as JSON."""
        return join(self.uri, "trackers", safe_name(tracker) + ".json")

    @property
    def lock_uri(self) -> str:
        """The driver that has the run open, as JSON."""
        return join(self.uri, "driver.lock")

    def stage_uri(self, kind: str, key: str) -> str:
        """Directory of one stage."""
        return join(self.uri, "stages", safe_name(kind), safe_name(key))

    def payload_uri(self, kind: str, key: str, attempt: int) -> str:
        """Where an attempt publishes its files; attempts never write to one another's."""
        return join(self.stage_uri(kind, key), f"payload-{attempt}")

    def commit(
        self,
        kind: str,
        key: str,
        result: ResultT,
        inputs: dict[str, Any],
        artifact: ArtifactRef | None,
        seconds: float,
    ) -> StoredStage[ResultT]:
        """Make a stage's result durable; the manifest is written last.

        `artifact` was published inside the run, under `payload_uri` or `models_uri`. If the stage is already
        committed, the first result stays and is returned.

        Raises:
            WorkError: the payload cannot be seen from here, or the disk is full.
        """
        if existing := self.load(kind, key, type(result)):
            return existing
        home = self.stage_uri(kind, key)
        if artifact is not None:
            self._check_payload_visible(artifact)
        content = _encode(self._portable(asdict(result)))  # type: ignore[call-overload]
        write_bytes(join(home, "result.json"), content)
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "key": key,
            "inputs": self._portable(inputs),
            "result": asdict(_file_ref("result.json", content)),
            "payload": None if artifact is None else self._portable(asdict(artifact)),
            "seconds": seconds,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "versions": installed_versions(),
        }
        write_bytes(join(home, "manifest.json"), _encode(manifest))
        return _stored(manifest, result, artifact, inputs)

    def load(self, kind: str, key: str, result_type: type[ResultT]) -> StoredStage[ResultT] | None:
        """A committed stage, or None if it has to run.

        Every byte of result and payload is checked against the manifest. If they
        do not match, the stage's directory is set aside with a warning, and the
        stage has to run again.
        """
        home = self.stage_uri(kind, key)
        text = read_bytes(join(home, "manifest.json"))
        if text is None:
            return None
        try:
            return self._load_checked(home, text, result_type)
        except (CorruptStageError, FileNotFoundError, ValueError) as error:
            aside = self._set_aside(kind, key)
            log.warning("stage %s %s is damaged (%s); set aside in %s and run again", kind, key, error, aside)
            return None

    def peek(self, kind: str, key: str, result_type: type[ResultT]) -> ResultT | None:
        """The result of a stage that looks committed; neither checks its payload nor changes anything."""
        home = self.stage_uri(kind, key)
        if read_bytes(join(home, "manifest.json")) is None:
            return None
        content = read_bytes(join(home, "result.json"))
        try:
            return _reader(result_type).validate_python(self._located(json.loads(content or b"")))
        except ValueError:
            return None

    def has_export(self, trajectory: str, count: int, unit: str = "layers") -> bool:
        """Whether a checkpoint of that trajectory and depth was written."""
        return read_bytes(join(self.models_uri(trajectory, count, unit), "config.json")) is not None

    def check_writable(self, needed_bytes: int = 0) -> None:
        """Write and delete a small file; on a local disk, also check the free space.

        Raises:
            RequestError: the storage path cannot be written or is too small.
        """
        local = local_path(self.uri)
        if local is None:
            self._write_probe()
            return
        with without_empty_directories(local):
            self._write_probe()
            free_bytes = shutil.disk_usage(local).free
        if free_bytes < needed_bytes:
            raise RequestError(
                f"storage path {self.uri} has {free_bytes:,} bytes free, but about {needed_bytes:,} are "
                "needed; free some space or choose another storage.path"
            )

    def _write_probe(self) -> None:
        probe = join(self.uri, f".probe-{os.urandom(4).hex()}.tmp")
        try:
            write_bytes(probe, b"probe")
            fs, path = filesystem(probe)
            fs.delete_file(path)
        except (OSError, WorkError) as error:
            raise RequestError(f"storage path {self.uri} cannot be written: {error}") from error

    def _load_checked(self, home: str, text: bytes, result_type: type[ResultT]) -> StoredStage[ResultT]:
        manifest = json.loads(text)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise CorruptStageError("the manifest is not one of this version")
        content = read_bytes(join(home, "result.json")) or b""
        expected = _reader(FileRef).validate_python(manifest["result"])
        if _file_ref("result.json", content) != expected:
            raise CorruptStageError("result.json does not match the manifest")
        artifact = _reader(ArtifactRef | None).validate_python(self._located(manifest["payload"]))
        if artifact is not None:
            _verify(artifact)
        result = _reader(result_type).validate_python(self._located(json.loads(content)))
        return _stored(manifest, result, artifact, self._located(manifest["inputs"]))

    def _check_payload_visible(self, artifact: ArtifactRef) -> None:
        if not artifact.uri.startswith(self.uri + "/"):
            raise ValueError(f"payload {artifact.uri} was not published inside the run {self.uri}")
        fs, root = filesystem(artifact.uri)
        infos = fs.get_file_info([f"{root}/{file.name}" for file in artifact.files])
        for file, info in zip(artifact.files, infos, strict=True):
            if info.size != file.size_bytes:
                raise WorkError(
                    f"payload file {artifact.uri}/{file.name} was published by a worker but is not seen from "
                    f"{socket.gethostname()}; storage.path must be one that all nodes share "
                    "(NFS, s3:// or gs://)"
                )

    def _set_aside(self, kind: str, key: str) -> str:
        """Move a damaged stage out of the way. A second caller finds nothing to move."""
        stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"
        source, target = (
            self.stage_uri(kind, key),
            join(self.uri, "stages", SET_ASIDE, f"{kind}-{key}-{stamp}"),
        )
        fs, source_path = filesystem(source)
        _, target_path = filesystem(target)
        with explained(source, "set aside"):
            if isinstance(fs, LocalFileSystem):
                fs.create_dir(os.path.dirname(target_path))
                if os.path.isdir(source_path):
                    os.rename(source_path, target_path)
                return target
            # The manifest goes first: without it there is no result.
            files = sorted(list_files(source, recursive=True), key=lambda f: f.base_name != "manifest.json")
            for info in files:
                fs.copy_file(info.path, target_path + info.path.removeprefix(source_path))
                fs.delete_file(info.path)
        return target

    def _portable(self, value: Any) -> Any:
        """JSON values in which URIs inside this run are relative to it, so that a run can be moved.

        Numbers that JSON lacks become the strings "nan", "inf" and "-inf", which
        pydantic reads back as floats.
        """
        if isinstance(value, Mapping):
            return {name: self._portable(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._portable(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(float(value))
        if isinstance(value, str) and value.startswith(self.uri + "/"):
            return RUN_PREFIX + value.removeprefix(self.uri)
        return value

    def _located(self, value: Any) -> Any:
        """The inverse of `_portable` for URIs."""
        if isinstance(value, dict):
            return {name: self._located(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self._located(item) for item in value]
        if isinstance(value, str) and value.startswith(RUN_PREFIX):
            return self.uri + value.removeprefix(RUN_PREFIX)
        return value


_reader: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
"""What checks and builds a value of a type from JSON; slow to make, so kept."""


def _encode(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False).encode()


def _file_ref(name: str, content: bytes) -> FileRef:
    return FileRef(name, len(content), hashlib.sha256(content).hexdigest())


def _stored(
    manifest: dict[str, Any], result: ResultT, artifact: ArtifactRef | None, inputs: dict[str, Any]
) -> StoredStage[ResultT]:
    described = {
        name: manifest[name] for name in ("kind", "key", "seconds", "created_at", "host", "versions")
    }
    return StoredStage(result=result, artifact=artifact, inputs=inputs, **described)


def _verify(artifact: ArtifactRef) -> None:
    """Compare every byte with the manifest."""
    fs, root = filesystem(artifact.uri)
    for file in artifact.files:
        with explained(artifact.uri, "read"), fs.open_input_stream(f"{root}/{file.name}") as stream:
            if sha256_of(stream) != (file.sha256, file.size_bytes):
                raise CorruptStageError(f"payload file {file.name} does not match the manifest")
