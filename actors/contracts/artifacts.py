"""Artifacts: directories of hashed files, and the hash of JSON values."""

import hashlib
import json
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from actors.contracts.settings import removed_fields


def digest(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class FileRef:
    """One file of an artifact: name relative to the artifact, size and SHA-256."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ArtifactRef:
    """A directory of files at `uri` (local path or s3://, gs://), with their hashes."""

    uri: str
    files: tuple[FileRef, ...]

    @property
    def sha256(self) -> str:
        """Hash of the content; where it lies does not matter."""
        return digest([[f.name, f.size_bytes, f.sha256] for f in self.files])


def to_json(value: Any) -> dict[str, Any]:
    """Return a contract object as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(_stored(value)))


def _stored(value: Any) -> Any:
    if is_dataclass(value):
        values = {f.name: _stored(getattr(value, f.name)) for f in fields(value)}
        return {**values, **removed_fields(type(value))}
    if isinstance(value, list | tuple):
        return [_stored(item) for item in value]
    return value
