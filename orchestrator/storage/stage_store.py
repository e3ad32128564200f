"""Content-addressed stage results of one run: commit, load, peek.

A stage's key is a hash of everything its result depends on, so a result found
under its key is the result. No manifest, no result.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Generic, TypeVar

from pyarrow.fs import LocalFileSystem
from pydantic import TypeAdapter

from actors.artifacts import (
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
from actors.contracts import ArtifactRef, FileRef
from actors.errors import RequestError, WorkError
from orchestrator.errors import CorruptStageError
from orchestrator.storage.layout import RunLayout

log = logging.getLogger(__name__)

FORMAT = 1
RUN_PREFIX = "run:/"
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


@cache
def installed_versions() -> Mapping[str, str]:
    """Return the versions of the packages that decide the numbers, of those installed at the first call."""
    found = {}
    for package in ("iterabre", "torch", "transformers", "peft", "deepspeed", "lm-eval", "ray", "pyarrow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Store(RunLayout):
    """All that one run leaves behind."""

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
        """Return a committed stage, or None if it has to run.

        Every byte of result and payload is checked against the manifest. If they
        do not match, the stage's directory is quarantined with a warning, and the
        stage has to run again.
        """
        home = self.stage_uri(kind, key)
        text = read_bytes(join(home, "manifest.json"))
        if text is None:
            return None
        try:
            return self._load_checked(home, text, result_type)
        except (CorruptStageError, FileNotFoundError, ValueError) as error:
            where = self._quarantine(kind, key)
            log.warning(
                "stage %s %s is damaged (%s); quarantined in %s and run again", kind, key, error, where
            )
            return None

    def peek(self, kind: str, key: str, result_type: type[ResultT]) -> ResultT | None:
        """Return the result of a stage that looks committed, without a check of its payload or any change."""
        home = self.stage_uri(kind, key)
        if read_bytes(join(home, "manifest.json")) is None:
            return None
        content = read_bytes(join(home, "result.json"))
        try:
            return _reader(result_type).validate_python(self._located(json.loads(content or b"")))
        except ValueError:
            return None

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

    def _quarantine(self, kind: str, key: str) -> str:
        """Move a damaged stage out of the way. A second caller finds nothing to move."""
        stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"
        source, target = self.stage_uri(kind, key), self.quarantine_uri(f"{kind}-{key}-{stamp}")
        fs, source_path = filesystem(source)
        _, target_path = filesystem(target)
        with explained(source, "quarantine"):
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
        """Return JSON values in which URIs inside this run are relative to it, so that a run can be moved.

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
        """Undo `_portable` for URIs."""
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
