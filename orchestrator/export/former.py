"""Exports of earlier versions, whose keys held their card: found again, and not written once more."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from actors.artifacts import join, list_files, read_bytes
from actors.contracts import ArtifactRef, ExportResult, digest
from actors.errors import StorageUnavailableError, WorkError
from orchestrator.storage.layout import CARD, PROVENANCE
from orchestrator.storage.stage_store import Store

log = logging.getLogger(__name__)

KIND = "export"


def find_former_export(store: Store, inputs: Mapping[str, Any], uri: str) -> ExportResult | None:
    """Return an export of the same model that still lies in the same place; None if there is none.

    Args:
        inputs: of the export's key: `model`, and `directory`, for which `uri` stands.
    """
    if (described := read_bytes(join(uri, PROVENANCE))) is None:
        return None
    there = hashlib.sha256(described).hexdigest()
    wanted = digest({name: value for name, value in inputs.items() if name != "directory"})
    for file in list_files(join(store.uri, "stages", KIND), recursive=True):
        if file.base_name != "manifest.json":
            continue
        key = file.path.rsplit("/", 2)[-2]
        manifest = json.loads(store.read_manifest(KIND, key) or b"{}")
        held = manifest.get("inputs", {})
        if "card" not in held:
            continue
        if digest({name: held[name] for name in held.keys() - {"card", "provenance"}}) != wanted:
            continue
        result = store.peek(KIND, key, ExportResult)
        if result is None or result.artifact.uri != uri:
            continue
        # Another model may have been written there since.
        if any(each.name == PROVENANCE and each.sha256 == there for each in result.artifact.files):
            return result
    return None


def adopt_former_export(store: Store, key: str, inputs: dict[str, Any], uri: str) -> None:
    """Commit under `key` what `find_former_export` finds, without card and provenance, if it is not there."""
    if store.peek(KIND, key, ExportResult) is not None:
        return
    if (result := find_former_export(store, inputs, uri)) is None:
        return
    files = tuple(file for file in result.artifact.files if file.name not in (CARD, PROVENANCE))
    artifact = ArtifactRef(uri, files)
    try:
        # What it took stands under its former key.
        store.commit(KIND, key, replace(result, artifact=artifact), inputs, artifact, seconds=0.0)
    except StorageUnavailableError:
        raise
    except WorkError as error:
        log.warning("the export at %s is written again: %s", uri, error)
