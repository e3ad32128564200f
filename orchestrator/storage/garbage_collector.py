"""Removes from a run what interrupted attempts left in it, and what finished stages need no more.

Called with the run locked and no stage at work, so whatever no manifest names is of no use.
"""

import json
import logging
from collections.abc import Iterable, Mapping

from pyarrow.fs import FileInfo, FileSelector, FileType

from actors.artifacts import attempt, filesystem, is_temporary, join, read_bytes
from orchestrator.errors import WorkError
from orchestrator.storage.layout import FORMER_QUARANTINE, QUARANTINE
from orchestrator.storage.stage_manifest import MANIFEST
from orchestrator.storage.stage_store import Store

log = logging.getLogger(__name__)

QUARANTINES = (QUARANTINE, FORMER_QUARANTINE)

Parts = tuple[str, ...]
"""A path inside the run, by its components."""


def collect(store: Store) -> None:
    """Remove temporary files, payloads that were not committed, and checkpoints of finished recoveries.

    Kept are all results, the quarantine, and the checkpoints that --resume continues from.
    A failure is only a warning: what remains costs space and nothing else.
    """
    try:
        attempt(store.uri, "remove leftovers from", lambda: _collect(store))
    except (FileNotFoundError, WorkError) as error:
        log.warning("leftovers of earlier attempts remain: %s", error)


def _collect(store: Store) -> None:
    fs, root = filesystem(store.uri)
    infos = fs.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
    paths = _paths_in(infos, root)
    committed = _committed(store, paths)
    for info in infos:
        if info.type == FileType.File and is_temporary(info.base_name):
            fs.delete_file(info.path)
    for parts in leftovers(paths, committed):
        log.info("removing %s: no result needs it", "/".join(parts))
        fs.delete_dir("/".join((root, *parts)))


def leftovers(paths: Iterable[Parts], committed: Mapping[Parts, str | None]) -> list[Parts]:
    """Return the directories that can go.

    Args:
        paths: every directory and file of the run.
        committed: the payload directory's name of each stage `(kind, key)` that has a manifest.
    """
    found: set[Parts] = set()
    for parts in paths:
        match parts:
            case ("stages", kind, key, *below) if kind not in QUARANTINES:
                if (kind, key) not in committed:
                    found.add(("stages", kind, key))
                elif below and below[0].startswith("payload-") and below[0] != committed[kind, key]:
                    found.add(("stages", kind, key, below[0]))
            case ("train", key, *_) if ("recover", key) in committed:
                found.add(("train", key))
            case ("parts", key, *_) if ("evaluate", key) in committed:
                found.add(("parts", key))
    return sorted(found)


def _paths_in(infos: Iterable[FileInfo], root: str) -> set[Parts]:
    return {tuple(info.path.removeprefix(root).strip("/").split("/")) for info in infos}


def _committed(store: Store, paths: Iterable[Parts]) -> dict[Parts, str | None]:
    found: dict[Parts, str | None] = {}
    for parts in paths:
        match parts:
            case ("stages", kind, key, name) if name == MANIFEST and kind not in QUARANTINES:
                found[kind, key] = _payload_of(store, kind, key)
            case ("train", key) if store.cache is not None and store.read_manifest("recover", key):
                found.setdefault(("recover", key), None)
            case ("parts", key) if store.cache is not None and store.read_manifest("evaluate", key):
                found.setdefault(("evaluate", key), None)
    return found


def _payload_of(store: Store, kind: str, key: str) -> str | None:
    """Return the name of the directory that holds the stage's payload; None if it has none."""
    uri = join(store.stage_uri(kind, key), MANIFEST)
    try:
        payload = json.loads(read_bytes(uri) or b"{}")["payload"]
    except (ValueError, KeyError) as error:
        raise WorkError(f"{uri} is damaged; --resume quarantines the stage") from error
    return None if payload is None else payload["uri"].rpartition("/")[2]
