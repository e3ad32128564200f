"""The stages that campaigns share (`storage.cache`): what is there, whether it is whole, what may go."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from actors.artifacts import delete_directory, delete_file, join, list_files, local_path, read_bytes
from orchestrator.errors import CorruptStageError
from orchestrator.storage.layout import QUARANTINE, RunLayout
from orchestrator.storage.stage_manifest import MANIFEST, payload_of
from orchestrator.storage.stage_store import check_payload, quarantine_stage

DAY_S = 86_400.0
RECENT_S = DAY_S
"""What was used or written so lately stays: a campaign that runs may be about to use it."""


@dataclass(frozen=True)
class CachedStage:
    """A directory of the cache. Times are seconds of the clock; without a manifest it is not `finished`."""

    kind: str
    key: str
    size_bytes: int
    created: float
    last_used: float
    finished: bool


def cached_stages(cache: RunLayout) -> list[CachedStage]:
    """Return all that lies in a cache, by kind and key."""
    root = join(cache.uri, "stages")
    found: dict[tuple[str, str], list[tuple[str, int, float]]] = {}
    for info in list_files(root, recursive=True):
        kind, key, name = info.path.partition("/stages/")[2].split("/", 2)
        found.setdefault((kind, key), []).append((name, info.size, info.mtime.timestamp()))
    stages = []
    for (kind, key), files in sorted(found.items()):
        times = [written for _, _, written in files]
        committed = [written for name, _, written in files if name == MANIFEST]
        size_bytes = sum(size for _, size, _ in files)
        finished = bool(committed) and kind != QUARANTINE
        created = committed[0] if committed else max(times)
        stages.append(CachedStage(kind, key, size_bytes, created, max(times), finished))
    return stages


def verified_stages(cache: RunLayout) -> Iterator[tuple[CachedStage, str | None]]:
    """Read every finished stage of a cache; yield it with what is wrong, for which it is quarantined."""
    for stage in cached_stages(cache):
        if not stage.finished:
            continue
        try:
            text = read_bytes(join(cache.stage_uri(stage.kind, stage.key), MANIFEST))
            if text is None:  # removed meanwhile
                continue
            if (payload := payload_of(json.loads(text), cache.uri)) is not None:
                check_payload(payload, {}, verify=True)
        except (CorruptStageError, FileNotFoundError, ValueError, KeyError) as error:
            quarantine_stage(cache, stage.kind, stage.key, str(error))
            yield stage, str(error)
        else:
            yield stage, None


def prunable(
    stages: Iterable[CachedStage], now: float, unused_days: float | None, keep_bytes: float | None
) -> Sequence[CachedStage]:
    """Return the stages to remove, the least recently used first.

    What was used within the last day stays. Of the rest go: what interrupted attempts left, what nobody has
    used for `unused_days`, and more until what remains takes no more than `keep_bytes`.
    """
    by_use = sorted(stages, key=lambda stage: stage.last_used)
    held = sum(stage.size_bytes for stage in by_use)
    chosen = []
    for stage in by_use:
        if now - stage.last_used < RECENT_S:
            continue
        leftover = not stage.finished and stage.kind != QUARANTINE
        unused = unused_days is not None and now - stage.last_used >= unused_days * DAY_S
        if leftover or unused or (keep_bytes is not None and held > keep_bytes):
            chosen.append(stage)
            held -= stage.size_bytes
    return chosen


def remove_stage(cache: RunLayout, stage: CachedStage) -> None:
    """Remove a stage from a cache, the manifest first: without it there is no result."""
    home = join(cache.uri, "stages", stage.kind, stage.key)
    delete_file(join(home, MANIFEST))
    delete_directory(home)


def is_there(cache: RunLayout) -> bool:
    """Return whether there is a cache to look at; in an object store, an empty one is none."""
    path = local_path(cache.uri)
    return bool(list_files(join(cache.uri, "stages"), recursive=True)) if path is None else path.is_dir()
