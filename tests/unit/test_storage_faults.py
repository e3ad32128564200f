"""What passes by itself is tried again; what does not ends the work at once; files are whole or not there."""

import errno
import hashlib
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FileSelector, FileType, LocalFileSystem, copy_files

from actors.artifacts import (
    create_bytes,
    fetch,
    list_files,
    publish,
    read_bytes,
    retrying_filesystem,
    write_bytes,
)
from actors.errors import StorageUnavailableError, WorkError
from tests.support.faulty_s3 import FAULTS, Faults, faulty_s3
from tests.support.object_store import loopback_s3


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.artifacts.retries.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("actors.artifacts.retries.LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr("actors.artifacts.retries.JITTER_S", 0.01)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / "cache"))
    with loopback_s3(monkeypatch) as uri:
        yield uri


@pytest.fixture
def faults(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        read_bytes(f"{bucket}/nothing")  # connects
        yield server


def test_a_store_that_asks_to_slow_down_is_written_a_little_later(bucket: str, faults: Faults) -> None:
    faults.upcoming = ["slow_down"] * 12
    write_bytes(f"{bucket}/a", b"data")
    assert faults.done["slow_down"] == 12
    assert read_bytes(f"{bucket}/a") == b"data"


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_survived(bucket: str, faults: Faults, tmp_path: Path, fault: Any) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/weights").write_bytes(os.urandom(2**20) * 20)
    faults.upcoming = [fault] * 4
    write_bytes(f"{bucket}/a", b"data")
    faults.upcoming = [fault] * 4
    assert read_bytes(f"{bucket}/a") == b"data"
    faults.upcoming = [None, fault, fault, None, fault]
    artifact = publish(tmp_path / "source", f"{bucket}/payload")
    faults.upcoming = [None, fault] * 4
    assert [info.base_name for info in list_files(f"{bucket}/payload")] == ["weights"]
    faults.upcoming = [fault] * 4
    assert (fetch(artifact) / "weights").read_bytes() == (tmp_path / "source/weights").read_bytes()
    faults.upcoming = [fault] * 4
    assert create_bytes(f"{bucket}/b", b"first")
    faults.upcoming = [fault] * 4
    assert not create_bytes(f"{bucket}/b", b"second")
    assert read_bytes(f"{bucket}/b") == b"first"


def test_random_faults_leave_whole_files(bucket: str, faults: Faults) -> None:
    faults.rate, faults.seed = 0.3, 1
    for number in range(30):
        write_bytes(f"{bucket}/{number}", str(number).encode())
        assert read_bytes(f"{bucket}/{number}") == str(number).encode()
    assert sum(faults.done.values()) > 10


def test_libraries_write_through_a_file_system_that_tries_again(
    bucket: str, faults: Faults, tmp_path: Path
) -> None:
    """As Ray Train does: pickled, checked by a marker, a directory copied there and back."""
    (tmp_path / "checkpoint/nested").mkdir(parents=True)
    for name in ("a", "nested/b"):
        (tmp_path / "checkpoint" / name).write_bytes(name.encode() * 100_000)
    made, path = retrying_filesystem(f"{bucket}/train/")
    assert path == "campaigns/train"
    fs = pickle.loads(pickle.dumps(made))
    assert fs == made
    faults.rate, faults.seed = 0.3, 2
    fs.create_dir(path)
    with fs.open_output_stream(f"{path}/.marker"):
        pass
    assert fs.get_file_info(f"{path}/.marker").type == FileType.File
    copy_files(
        str(tmp_path / "checkpoint"), f"{path}/step_1",
        source_filesystem=LocalFileSystem(), destination_filesystem=fs,
    )  # fmt: skip
    copy_files(
        f"{path}/step_1", str(tmp_path / "back"),
        source_filesystem=fs, destination_filesystem=LocalFileSystem(),
    )  # fmt: skip
    for name in ("a", "nested/b"):
        assert (tmp_path / "back" / name).read_bytes() == name.encode() * 100_000
    names = {info.base_name for info in fs.get_file_info(FileSelector(path, recursive=True))}
    assert names == {".marker", "step_1", "a", "nested", "b"}
    fs.delete_dir(f"{path}/step_1")
    assert fs.get_file_info(f"{path}/step_1/a").type == FileType.NotFound
    assert faults.done
    assert retrying_filesystem(str(tmp_path)) == (None, str(tmp_path))


def test_a_store_that_stays_away_is_named_after_the_stated_time(
    bucket: str, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ITERABRE_STORAGE_RETRY_S", "1.5")
    faults.rate = 0.0
    faults.upcoming = ["internal_error"] * 10_000
    started = time.monotonic()
    with pytest.raises(StorageUnavailableError, match=r"cannot write s3://campaigns/a.*--resume"):
        write_bytes(f"{bucket}/a", b"data")
    assert 1.0 < time.monotonic() - started < 10


def test_a_missing_bucket_is_named_at_once(bucket: str) -> None:
    started = time.monotonic()
    with pytest.raises(WorkError, match=r"there is no bucket 'no-such-bucket'") as refused:
        write_bytes("s3://no-such-bucket/a", b"data")
    assert not isinstance(refused.value, StorageUnavailableError)
    assert time.monotonic() - started < 5


def test_an_nfs_server_that_forgot_a_handle_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, failures = os.fsync, [errno.ESTALE, errno.EIO, errno.ETIMEDOUT]

    def flaky(descriptor: int) -> None:
        if failures:
            raise OSError(failures.pop(), "flaky")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flaky)
    write_bytes(str(tmp_path / "a"), b"data")
    assert read_bytes(str(tmp_path / "a")) == b"data"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkError, match="the disk is full"):
        write_bytes(str(tmp_path / "a"), b"data")
    assert len(calls) == 1


class Interrupted(Exception):
    """Stands for whatever ends a process in the middle of an upload."""


def test_an_interrupted_upload_leaves_no_object(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/weights").write_bytes(bytes(2**25))
    chunks = []

    class Hash:
        def update(self, chunk: bytes) -> None:
            chunks.append(chunk)
            if len(chunks) == 3:
                raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "sha256", Hash)
        with pytest.raises(Interrupted):
            publish(tmp_path / "source", f"{bucket}/payload")
    assert list_files(f"{bucket}/payload") == []


def test_a_file_is_created_once(bucket: str, tmp_path: Path) -> None:
    for root in (str(tmp_path / "run"), bucket):
        assert create_bytes(f"{root}/manifest.json", b"first")
        assert not create_bytes(f"{root}/manifest.json", b"second")
        assert create_bytes(f"{root}/manifest.json", b"first"), "a request whose answer was lost"
        assert read_bytes(f"{root}/manifest.json") == b"first"
    assert os.listdir(tmp_path / "run") == ["manifest.json"]


def test_a_file_is_created_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links")

    monkeypatch.setattr(os, "link", refuse)
    assert create_bytes(str(tmp_path / "a"), b"first")
    assert not create_bytes(str(tmp_path / "a"), b"second")
    assert os.listdir(tmp_path) == ["a"]


def test_credentials_of_a_profile_file_are_used(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = a\n[work]\naws_access_key_id = b\naws_secret_access_key = c\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    write_bytes(f"{bucket}/a", b"data")
    assert read_bytes(f"{bucket}/a") == b"data"
