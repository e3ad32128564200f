"""The manifest of a finished stage: one JSON object that holds the result and describes the payload.

It is the commit: no manifest, no result. URIs inside the directory that the stage lies in are written
relative to it, so that a run, or a cache of stages, can be moved.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from actors.artifacts import join, read_bytes
from actors.contracts import ArtifactRef, FileRef
from orchestrator.errors import CorruptStageError

FORMAT = 2
FORMAT_OF_TWO_FILES = 1
"""Until then the result was a file of its own, whose hash the manifest held."""

MANIFEST = "manifest.json"
ROOT_PREFIX = "run:/"
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class StoredStage(Generic[ResultT]):
    """A finished stage: its result, its payload, and how it came to be.

    `seconds` is the time that it held what it computes on, `waited_s` that in which it waited for it.
    """

    kind: str
    key: str
    result: ResultT
    artifact: ArtifactRef | None
    inputs: dict[str, Any]
    seconds: float
    created_at: str
    host: str
    versions: Mapping[str, str]
    waited_s: float = 0.0
    etags: Mapping[str, str] | None = None


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


def encode_stage(stage: StoredStage[Any], root: str) -> bytes:
    """Return the manifest of a stage that lies under `root`."""
    described = {
        "format": FORMAT,
        "kind": stage.kind,
        "key": stage.key,
        "inputs": stage.inputs,
        "result": asdict(stage.result),
        "payload": None if stage.artifact is None else asdict(stage.artifact),
        "seconds": stage.seconds,
        "waited_s": stage.waited_s,
        "created_at": stage.created_at,
        "host": stage.host,
        "versions": stage.versions,
        **({"etags": stage.etags} if stage.etags else {}),
    }
    return json.dumps(_portable(described, root), indent=1, allow_nan=False, ensure_ascii=False).encode()


def decode_stage(
    text: bytes, root: str, home: str, result_type: type[ResultT], checked: bool = True
) -> StoredStage[ResultT]:
    """Return the stage that the manifest `text` describes, its URIs under `root`.

    Args:
        home: the stage's directory, where a stage of an earlier version has its result.
        checked: compare such a result with its hash.

    Raises:
        ValueError, CorruptStageError: it is not what was written.
    """
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.get("format") not in (FORMAT, FORMAT_OF_TWO_FILES):
        raise CorruptStageError("the manifest is not one of this version")
    try:
        result = manifest["result"]
        if manifest["format"] == FORMAT_OF_TWO_FILES:
            result = _result_of_its_own(home, result if checked else None)
        described = {name: manifest[name] for name in ("kind", "key", "seconds", "created_at", "host")}
        return StoredStage(
            **described,
            versions=manifest["versions"],
            result=_reader(result_type).validate_python(_located(result, root)),
            artifact=_reader(ArtifactRef | None).validate_python(_located(manifest["payload"], root)),
            inputs=_located(manifest["inputs"], root),
            waited_s=manifest.get("waited_s", 0.0),
            etags=manifest.get("etags"),
        )
    except KeyError as error:
        raise CorruptStageError(f"the manifest lacks {error}") from error


def payload_of(manifest: Mapping[str, Any], root: str) -> ArtifactRef | None:
    """Return the payload that a manifest, read as JSON, names."""
    payload: ArtifactRef | None = _reader(ArtifactRef | None).validate_python(
        _located(manifest["payload"], root)
    )
    return payload


def _result_of_its_own(home: str, expected: Any) -> Any:
    content = read_bytes(join(home, "result.json")) or b""
    found = FileRef("result.json", len(content), hashlib.sha256(content).hexdigest())
    if expected is not None and _reader(FileRef).validate_python(expected) != found:
        raise CorruptStageError("result.json does not match the manifest")
    return json.loads(content)


def _portable(value: Any, root: str) -> Any:
    """Return JSON values in which URIs under `root` are relative to it.

    Numbers that JSON lacks become the strings "nan", "inf" and "-inf", which
    pydantic reads back as floats.
    """
    if isinstance(value, Mapping):
        return {name: _portable(item, root) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item, root) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, str) and value.startswith(root + "/"):
        return ROOT_PREFIX + value.removeprefix(root)
    return value


def _located(value: Any, root: str) -> Any:
    """Undo `_portable` for URIs."""
    if isinstance(value, dict):
        return {name: _located(item, root) for name, item in value.items()}
    if isinstance(value, list):
        return [_located(item, root) for item in value]
    if isinstance(value, str) and value.startswith(ROOT_PREFIX):
        return root + value.removeprefix(ROOT_PREFIX)
    return value


_reader: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
"""What checks and builds a value of a type from JSON; slow to make, so kept."""
