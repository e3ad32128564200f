"""One driver at a time, on a disk and on an S3-speaking server."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import RunInUseError
from orchestrator.storage import run_lock
from orchestrator.storage.run_lock import check_unlocked, locked
from orchestrator.storage.stage_store import Store
from tests.support.object_store import loopback_s3


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.2)
    monkeypatch.setattr(run_lock, "LOCK_LEASE_S", 1.5)


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    if request.param == "disk":
        yield Store(str(tmp_path / "run"))
    else:
        with loopback_s3(monkeypatch) as bucket:
            yield Store(f"{bucket}/run")


def _write(store: Store, host: str, pid: int) -> None:
    run_lock._write(store, run_lock.Lock("other", host, pid))


def test_a_second_driver_is_refused_while_the_first_is_alive(store: Store) -> None:
    with locked(store):
        message = rf"is in use by another driver \(process {os.getpid()} on .*; wait .* --resume"
        for _ in range(2):
            with pytest.raises(RunInUseError, match=message), locked(store):
                raise AssertionError("two drivers have the run")
    with locked(store):
        pass


def test_a_lock_that_stands_still_is_taken_over(store: Store) -> None:
    _write(store, "another-machine", 1)
    started = time.monotonic()
    with locked(store):
        assert time.monotonic() - started >= run_lock.LOCK_LEASE_S


def test_a_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    run_lock._write(store, run_lock.Lock("other", "any", dead.pid, pids=run_lock.pid_namespace()))
    started = time.monotonic()
    check_unlocked(store)
    assert time.monotonic() - started < run_lock.LOCK_LEASE_S / 2


HOLDER = """
import sys, time
from orchestrator.storage.run_lock import locked
from orchestrator.storage.stage_store import Store
with locked(Store(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_driver_in_another_container_of_the_same_host_name_keeps_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PID namespace of its own, where the driver's process has a number that runs nothing here."""
    isolated = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("PID namespaces are not permitted here")
    command = [*isolated, sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "locked\n"
            lock = json.loads((tmp_path / "driver.lock").read_text())
            assert lock["host"] == socket.gethostname()
            # A number that is none of ours.
            (tmp_path / "driver.lock").write_text(json.dumps(lock | {"pid": 2**22 - 3}))
            monkeypatch.setattr(run_lock, "LOCK_LEASE_S", 12.0)
            with pytest.raises(RunInUseError):
                check_unlocked(Store(str(tmp_path)))
        finally:
            holder.kill()


def test_of_two_that_start_at_once_one_gets_the_run(store: Store) -> None:
    got: list[str] = []
    begin = threading.Barrier(2)

    def driver() -> None:
        begin.wait()
        try:
            with locked(store):
                got.append("run")
                time.sleep(1.0)
        except RunInUseError:
            got.append("refused")

    drivers = [threading.Thread(target=driver) for _ in range(2)]
    for thread in drivers:
        thread.start()
    for thread in drivers:
        thread.join()
    assert sorted(got) == ["refused", "run"]


def test_the_lock_is_renewed_and_gone_at_the_end(tmp_path: Path) -> None:
    store, file = Store(str(tmp_path)), tmp_path / "driver.lock"
    with locked(store):
        first = json.loads(file.read_text())
        time.sleep(0.7)
        assert json.loads(file.read_text())["beats"] > first["beats"]
    assert not file.exists()
