"""One driver at a time: a lease in the run's directory, on any file system or object store.

The lock says who holds it and counts that driver's heart-beats. No clocks are
compared: a lock is stale when its count stands still for a whole lease, or when its
process, known to have run in this PID namespace, no longer does. A stale lock is
replaced by writing over it, so whoever writes one looks again a moment later; of two
that write at once, the last one has it.
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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from actors.artifacts import delete_file, local_path, read_bytes, write_bytes
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
    """Who has a run open, and how often it has said so; `pids` names what the process id is an id in."""

    owner: str
    host: str
    pid: int
    beats: int = 0
    pids: str = ""


def pid_namespace() -> str:
    """Return a name of this process's PID namespace that no other has, on no machine; empty if unknown.

    Containers may share a host's name and each have a process 7 of its own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


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
    lock = Lock(uuid.uuid4().hex, socket.gethostname(), os.getpid(), pids=pid_namespace())
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
            delete_file(store.lock_uri)


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
    """Return whether the driver is known to have ended: its process ran beside this one and is not there."""
    if not lock.pids or lock.pids != pid_namespace():
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
    content = read_bytes(store.lock_uri, limit_s=LOCK_LEASE_S)
    known = {field.name for field in fields(Lock)}
    stored = {} if content is None else json.loads(content)
    return Lock(**{name: value for name, value in stored.items() if name in known}) if stored else None


def _write(store: Store, lock: Lock) -> None:
    # Not for longer: what was true then may have been taken over.
    write_bytes(store.lock_uri, json.dumps(asdict(lock)).encode(), limit_s=LOCK_LEASE_S / 2)
