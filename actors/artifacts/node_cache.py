"""The directory of this node for downloads, and which of them may go.

Downloads share a bounded space. Before another one comes, those that were used least recently go,
but never one that a process of this node has in use: it holds a lock on it for as long as it lives.
"""

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from actors.artifacts.objects import open_then_rename, sha256_of
from actors.contracts import digest
from actors.errors import RequestError

log = logging.getLogger(__name__)

LIMIT_VARIABLE = "ITERABRE_CACHE_GB"
"""The variable with the most that downloads may take on this node, in GB."""
DEFAULT_SHARE = 0.5
"""Of the disk, where the variable is not set."""

ARTIFACTS = "artifacts"
_in_use: dict[Path, int] = {}
"""Open files of the locks that this process holds, by the entry; the process's end closes them."""


def cache_dir() -> Path:
    """Return this node's directory for downloads: `ITERABRE_CACHE`, else `~/.cache/iterabre`.

    Raises:
        RequestError: it is in the home directory of a user who has none.
    """
    chosen = os.environ.get("ITERABRE_CACHE") or "~/.cache/iterabre"
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise _no_cache(chosen, "this user has no home directory") from error


def cache_entry(kind: str, key: str) -> Path:
    """Return the place of `key` in the cache, which is there or can be made.

    Raises:
        RequestError: it is not there, and the cache cannot be written.
    """
    entry = cache_dir() / kind / key
    try:
        if not entry.exists():
            entry.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=entry.parent):
                pass
    except OSError as error:
        raise _no_cache(str(entry.parent), error.strerror or str(error)) from error
    return entry


def _no_cache(place: str, reason: str) -> RequestError:
    return RequestError(
        f"the cache {place} cannot be written: {reason}; set ITERABRE_CACHE to a directory that can"
    )


def artifact_entry(key: str) -> Path:
    """Return the place of a downloaded artifact, which stays there until this process ends.

    Raises:
        RequestError: as `cache_entry`.
    """
    entry = cache_entry(ARTIFACTS, key)
    lock = _lock_file(entry)
    if entry not in _in_use:
        lock.parent.mkdir(parents=True, exist_ok=True)
        opened = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(opened, fcntl.LOCK_SH)
        _in_use[entry] = opened
    os.utime(lock)
    return entry


@contextmanager
def filling(entry: Path) -> Iterator[None]:
    """Hold the sole right on this node to fill an entry: others wait for it, and then find it filled."""
    lock = _lock_file(entry)
    with lock.with_name(f"{lock.name}.filling").open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def make_space(needed_bytes: int) -> None:
    """Remove downloads that nobody uses, the least recently used first, until so many bytes more fit."""
    root = cache_dir() / ARTIFACTS
    entries = [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    cached = [
        CachedArtifact(entry.name, _size_of(entry), _last_used(entry), not _unused(entry, lambda _: None))
        for entry in entries
    ]
    disk = shutil.disk_usage(root)
    for name in expendable(cached, needed_bytes, limit_bytes(disk.total), disk.free):
        _unused(root / name, _evict)


@dataclass(frozen=True)
class CachedArtifact:
    """A downloaded artifact, its size, when a process last asked for it, and whether one has it in use."""

    name: str
    size_bytes: int
    last_used: float
    in_use: bool = False


def expendable(
    cached: Iterable[CachedArtifact], needed_bytes: int, limit_bytes: int, free_bytes: int
) -> Sequence[str]:
    """Return the artifacts to remove, in that order, so that `needed_bytes` more fit.

    Together they may take `limit_bytes`, and no more than the disk has free.
    """
    by_use = sorted(cached, key=lambda each: each.last_used)
    held = sum(each.size_bytes for each in by_use)
    excess = max(held + needed_bytes - limit_bytes, needed_bytes - free_bytes)
    chosen = []
    for each in by_use:
        if excess <= 0:
            break
        if each.in_use:
            continue
        chosen.append(each.name)
        excess -= each.size_bytes
    return chosen


def limit_bytes(disk_bytes: int) -> int:
    """Return what downloads may take on a disk of that size.

    Raises:
        RequestError: the variable holds no number.
    """
    given = os.environ.get(LIMIT_VARIABLE)
    if not given:
        return int(disk_bytes * DEFAULT_SHARE)
    try:
        return int(float(given) * 1e9)
    except ValueError as error:
        raise RequestError(f"{LIMIT_VARIABLE}={given!r} is no number of GB") from error


def _unused(entry: Path, then: Callable[[Path], None]) -> bool:
    """Return whether no process has a downloaded artifact in use; call `then` while none can begin to."""
    lock = _lock_file(entry)
    lock.parent.mkdir(parents=True, exist_ok=True)
    opened = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        then(entry)
    except BlockingIOError:
        return False
    finally:
        os.close(opened)
    return True


def _evict(entry: Path) -> None:
    log.info("removing the download %s: others need its space", entry)
    going = entry.with_name(f".evicted-{entry.name}")
    with suppress(FileNotFoundError):
        entry.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _lock_file(entry: Path) -> Path:
    return cache_dir() / "in-use" / entry.name


def _last_used(entry: Path) -> float:
    with suppress(FileNotFoundError):
        return _lock_file(entry).stat().st_mtime
    return 0.0


def _size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a local file, remembered on this node for as long as the file is left alone.

    It is remembered by the file's path, number, size and times of change, where the cache can be written.
    A copy can take over the time of change; that of the inode's change shows that it was exchanged.
    """
    status = file.stat()
    stamp = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    identity = digest([str(file.resolve()), *stamp])
    with suppress(OSError, ValueError, RequestError):
        known = json.loads((cache_dir() / "sha256" / identity).read_text(encoding="utf-8"))
        if isinstance(known, str) and len(known) == 64:
            return known
    with file.open("rb") as stream:
        value, _ = sha256_of(stream)
    with suppress(OSError, RequestError):
        memo = cache_entry("sha256", identity)
        with open_then_rename(memo) as target:
            target.write(json.dumps(value).encode())
    return value
