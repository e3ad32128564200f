"""Artifacts are whole and verified, or there is an error that says what to do."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors import artifacts
from actors.artifacts import fetch, list_files, publish, read_bytes, write_bytes
from actors.contracts import ArtifactRef, FileRef
from actors.errors import RequestError, WorkError
from tests.support.object_store import loopback_s3

FILES = {"adapter.safetensors": b"weights" * 1000, "nested/config.json": b"{}"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / "cache"))
    with loopback_s3(monkeypatch) as uri:
        yield uri


def _contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_publish_records_sizes_and_hashes(source: Path, tmp_path: Path) -> None:
    ref = publish(source, str(tmp_path / "target"))
    expected = tuple(FileRef(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in sorted(FILES.items()))
    assert ref.files == expected
    assert _contents(tmp_path / "target") == FILES


def test_local_artifact_is_used_in_place(source: Path, tmp_path: Path) -> None:
    ref = publish(source, str(tmp_path / "target"))
    assert fetch(ref) == tmp_path / "target"


def test_object_store_artifact_is_downloaded_once(source: Path, bucket: str) -> None:
    ref = publish(source, f"{bucket}/models/a")
    directory = fetch(ref)
    assert _contents(directory) == FILES
    assert directory.parent.parent == artifacts.cache_dir()
    inode = (directory / "adapter.safetensors").stat().st_ino
    assert (fetch(ref) / "adapter.safetensors").stat().st_ino == inode


def test_damaged_upload_is_refused_and_leaves_nothing(source: Path, bucket: str) -> None:
    ref = publish(source, f"{bucket}/models/a")
    write_bytes(f"{ref.uri}/nested/config.json", b"[]")
    with pytest.raises(WorkError, match=r"nested/config.json is not what was published.*--resume"):
        fetch(ref)
    assert not (artifacts.cache_dir() / "artifacts" / ref.sha256).exists()


def _fetch_in_process(ref: ArtifactRef, barrier: "multiprocessing.synchronize.Barrier") -> None:
    barrier.wait()
    assert _contents(fetch(ref)) == FILES


def test_two_processes_fetch_the_same_artifact(source: Path, bucket: str) -> None:
    ref = publish(source, f"{bucket}/models/a")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_fetch_in_process, args=(ref, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [p.name for p in (artifacts.cache_dir() / "artifacts").iterdir()] == [ref.sha256]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"{"), "has 1 bytes, not 2"),
        (lambda path: path.write_bytes(b"[]"), "has SHA-256"),
    ],
)
def test_damaged_local_file_is_named(source: Path, tmp_path: Path, damage, message: str) -> None:
    ref = publish(source, str(tmp_path / "target"))
    damage(tmp_path / "target/nested/config.json")
    with pytest.raises(WorkError, match=f"target/nested/config.json {message}.*delete.*--resume"):
        fetch(ref)


def test_artifact_of_another_machine_is_explained(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"not on this machine.*NFS"):
        fetch(ArtifactRef(str(tmp_path / "elsewhere"), (FileRef("a", 1, "0"),)))


def test_file_names_cannot_lead_out(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="leads out"):
        fetch(ArtifactRef(str(tmp_path), (FileRef("../a", 1, "0"),)))


def test_empty_directory_is_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="nothing to publish"):
        publish(tmp_path, str(tmp_path / "target"))


def test_unknown_scheme_is_a_wrong_request() -> None:
    with pytest.raises(RequestError, match="s3://"):
        write_bytes("ftp://host/a", b"")


def test_missing_bucket_is_named(bucket: str) -> None:
    with pytest.raises(WorkError, match="cannot write s3://no-such-bucket/a"):
        write_bytes("s3://no-such-bucket/a", b"data")


def test_reading_what_is_not_there(tmp_path: Path, bucket: str) -> None:
    for root in (str(tmp_path), bucket):
        assert read_bytes(f"{root}/nothing") is None
        assert list_files(f"{root}/nothing") == []


def test_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_bytes(str(target), b"old")
    with pytest.raises(TypeError):
        write_bytes(str(target), "not bytes")  # type: ignore[arg-type]
    assert _contents(tmp_path) == {"file": b"old"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_explained(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(WorkError, match="permission denied"):
        write_bytes(str(tmp_path / "a"), b"")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where the test may mount one."""
    mount_point = tmp_path / "small"
    mount_point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount_point)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


def test_full_disk_is_explained(source: Path, small_disk: Path) -> None:
    (source / "big").write_bytes(b"0" * 2**21)
    with pytest.raises(WorkError, match=r"cannot write .*big: the disk is full.*--resume"):
        publish(source, str(small_disk / "payload"))
    assert "big" not in _contents(small_disk / "payload")


PUBLISH = """
import sys
from pathlib import Path
from actors.artifacts import publish
publish(Path(sys.argv[1]), sys.argv[2])
"""


def test_sigkill_in_mid_publish_leaves_no_file(source: Path, tmp_path: Path) -> None:
    with (source / "a").open("wb") as sparse:
        sparse.truncate(2**31)
    target = tmp_path / "payload"
    writer = subprocess.Popen([sys.executable, "-c", PUBLISH, str(source), str(target)])
    deadline = time.monotonic() + 60
    while not list(target.glob(".a.*.tmp")):
        assert writer.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    writer.kill()
    writer.wait()
    assert list(target.glob(".a.*.tmp"))
    assert list_files(str(target)) == []
    (source / "a").unlink()
    assert fetch(publish(source, str(target))) == target
