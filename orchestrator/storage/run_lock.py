"""One driver at a time: a lease in the run's directory, on any file system or object store.

The lock says who holds it and counts that driver's heart-beats. No clocks are
compared: a lock is stale when its count stands still for a whole lease, or when its
process no longer runs on this machine. Object stores cannot create a file only
if there is none, so whoever writes the lock looks again a moment later; of two that
write at once, the last one has it.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from actors.artifacts import filesystem, local_path, read_bytes, write_bytes
from orchestrator.errors import RunInUseError, WorkError
from orchestrator.storage.stage_store import Store

log = logging.getLogger(__name__)

AT_ONCE_S = 0.5
"""Between the two signals by which a driver that lost its run is ended."""

BEAT_S = 5.0
LOCK_LEASE_S = 30.0
SETTLE_S = 1.0
DISK_SETTLE_S = 0.2
"""Longer than it takes from looking for a lock to having written one."""


@dataclass(frozen=True)
class Lock:
    """Who has a run open, and how often it has said so."""

    owner: str
    host: str
    pid: int
    beats: int = 0


def check_unlocked(store: Store) -> None:
    """Refuse a run that another driver has open; waits up to a lease for one that may have ended.

    Raises:
        RunInUseError: its driver runs; names it.
    """
    first = _read(store)
    if first is None or _has_ended(first):
        return
    deadline = time.monotonic() + LOCK_LEASE_S
    while time.monotonic() < deadline:
        now = _read(store)
        if now is None:
            return
        if now != first:
            raise _in_use(store, now)
        time.sleep(min(1.0, BEAT_S / 2))


@contextmanager
def locked(store: Store) -> Iterator[None]:
    """Have the run for this driver while the body runs.

    Raises:
        RunInUseError: another driver has it, or was faster.
    """
    check_unlocked(store)
    lock = Lock(uuid.uuid4().hex, socket.gethostname(), os.getpid())
    _write(store, lock)
    time.sleep(SETTLE_S if local_path(store.uri) is None else DISK_SETTLE_S)
    if (now := _read(store)) is not None and now.owner != lock.owner:
        raise _in_use(store, now)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(store, lock, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if (now := _read(store)) is not None and now.owner == lock.owner:
            fs, path = filesystem(store.lock_uri)
            fs.delete_file(path)


def _beat(store: Store, lock: Lock, ended: threading.Event) -> None:
    """Renew the lock. If it was taken over, since this process stood still for a lease, end the campaign."""
    beats = 0
    while not ended.wait(BEAT_S):
        try:
            now = _read(store)
            if now is not None and now.owner != lock.owner:
                os.kill(os.getpid(), signal.SIGTERM)
                if not ended.wait(AT_ONCE_S):  # the first only asks to stop, the second stops at once
                    os.kill(os.getpid(), signal.SIGTERM)
                return
            beats += 1
            _write(store, replace(lock, beats=beats))
        except WorkError as error:
            log.warning("the lock of %s could not be renewed: %s", store.uri, error)


def _has_ended(lock: Lock) -> bool:
    """Return whether the driver is known to have ended: its process ran on this machine and is not there."""
    if lock.host != socket.gethostname():
        return False
    try:
        os.kill(lock.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _in_use(store: Store, lock: Lock) -> RunInUseError:
    return RunInUseError(
        f"{store.uri} is in use by another driver (process {lock.pid} on {lock.host}); wait for its end, "
        "or stop it and run this again with --resume"
    )


def _read(store: Store) -> Lock | None:
    content = read_bytes(store.lock_uri)
    return None if content is None else Lock(**json.loads(content))


def _write(store: Store, lock: Lock) -> None:
    write_bytes(store.lock_uri, json.dumps(asdict(lock)).encode())
