"""Directories of files on a local path, NFS, `s3://` or `gs://`, known by their content.

On a local file system a file appears whole or not at all: it is written under
a temporary name, flushed to the disk, then renamed. An object store gives the
same promise, because an upload becomes visible only when it is complete.
The endpoint of an S3-compatible store is read from `AWS_ENDPOINT_URL`.
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from pyarrow import ArrowInvalid
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from actors.contracts import ArtifactRef, FileRef, digest
from actors.errors import RequestError, WorkError

CHUNK_BYTES = 8 * 2**20

DRIVER_DIRECTORY = "ITERABRE_DRIVER_DIRECTORY"
"""The variable that holds the driver's directory for workers, which have directories of their own."""


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


def filesystem(uri: str) -> tuple[FileSystem, str]:
    """Return the file system that holds `uri`, and the path within it (absolute if local)."""
    if "://" not in uri:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return FileSystem.from_uri(uri)
    except ArrowInvalid as error:
        raise RequestError(
            f"cannot use {uri!r} as a storage location ({error}); give a local path, s3://, gs:// or file://"
        ) from error


def local_path(uri: str) -> Path | None:
    """Return `uri` as a path of the local file system, or None if it lies elsewhere."""
    fs, path = filesystem(uri)
    return Path(path) if isinstance(fs, LocalFileSystem) else None


def join(uri: str, *names: str) -> str:
    """Return `uri` with path components appended."""
    return "/".join((uri.rstrip("/"), *names))


def publish(local_dir: Path, uri: str) -> ArtifactRef:
    """Copy every file under `local_dir` to `uri`, hashing on the way.

    Raises:
        WorkError: there is nothing to publish, or the target cannot be written.
    """
    names = sorted(p.relative_to(local_dir).as_posix() for p in local_dir.rglob("*") if p.is_file())
    if not names:
        raise WorkError(f"nothing to publish: {local_dir} holds no files")
    files = []
    for name in names:
        with (local_dir / name).open("rb") as reader, _open_atomic(join(uri, name)) as writer:
            sha256, size_bytes = sha256_of(reader, copy_to=writer)
        files.append(FileRef(name, size_bytes, sha256))
    return ArtifactRef(uri=uri, files=tuple(files))


def fetch(ref: ArtifactRef) -> Path:
    """Return a local directory that holds the files of `ref`, verified.

    A local artifact is used where it is. Any other is downloaded once per node
    into `cache_dir()` under the hash of its content, by the first process that needs it.

    Raises:
        WorkError: a file is missing, damaged, or cannot be stored here.
    """
    directory = local_path(ref.uri)
    if directory is None:
        directory = cache_entry("artifacts", ref.sha256)
        if not directory.is_dir():
            _download(ref, directory)
    elif not directory.is_dir():
        raise WorkError(
            f"artifact {ref.uri} is not on this machine; with several nodes the storage path "
            "must be one that all of them see (NFS, s3:// or gs://)"
        )
    for file in ref.files:
        path = _inside(directory, file.name)
        if not path.is_file():
            raise _damaged(str(directory), file.name, "is missing")
        if path.stat().st_size != file.size_bytes:
            found = f"has {path.stat().st_size} bytes, not {file.size_bytes}"
            raise _damaged(str(directory), file.name, found)
    _verify_hashes(str(directory), ref.files)
    return directory


def write_bytes(uri: str, data: bytes) -> None:
    """Write one file atomically: a reader sees the old content, the new, or nothing."""
    with _open_atomic(uri) as target:
        target.write(data)


def read_bytes(uri: str) -> bytes | None:
    """Return the content of one file, or None if there is no such file."""
    fs, path = filesystem(uri)
    with explained(uri, "read"):
        try:
            with fs.open_input_stream(path) as source:
                return source.read()
        except (FileNotFoundError, NotADirectoryError):
            return None


@contextmanager
def without_empty_directories(path: Path) -> Iterator[None]:
    """Remove afterwards `path` and those of its parents that are new and still empty."""
    new = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        yield
    finally:
        for directory in new:
            if directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()


def list_files(uri: str, recursive: bool = False) -> list[FileInfo]:
    """Return the files directly (or anywhere) under `uri`, by path; empty if nothing is there.

    Files still being written are not listed.
    """
    fs, path = filesystem(uri)
    with explained(uri, "list"):
        found = fs.get_file_info(FileSelector(path, recursive=recursive, allow_not_found=True))
    files = (info for info in found if info.type == FileType.File and not is_temporary(info.base_name))
    return sorted(files, key=lambda info: info.path)


def sha256_of(stream: IO[bytes], copy_to: IO[bytes] | None = None) -> tuple[str, int]:
    """Return SHA-256 (hex) and length in bytes of a stream, copied to another while it is read."""
    state, size_bytes = hashlib.sha256(), 0
    while chunk := stream.read(CHUNK_BYTES):
        state.update(chunk)
        size_bytes += len(chunk)
        if copy_to is not None:
            copy_to.write(chunk)
    return state.hexdigest(), size_bytes


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
        with _open_then_rename(memo) as target:
            target.write(json.dumps(value).encode())
    return value


def place_and_date(uri: str) -> str:
    """Return a hash of a file's place, size and time of change, without reading it."""
    fs, path = filesystem(uri)
    (info,) = fs.get_file_info([path])
    return digest([uri, info.size, str(info.mtime)])


@contextmanager
def explained(place: str, doing: str) -> Iterator[None]:
    """Turn an operating system error into a `WorkError` that names place and remedy.

    A missing file stays a `FileNotFoundError`: its meaning depends on the caller.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        remedies = {
            errno.ENOSPC: "the disk is full; free some space or move the storage path",
            errno.EDQUOT: "the disk quota is used up; free some space or move the storage path",
            errno.EACCES: "permission denied; give this user access or choose another path",
            errno.EPERM: "permission denied; give this user access or choose another path",
            errno.EROFS: "the file system is read-only; choose another path",
        }
        reason = remedies.get(error.errno or 0, str(error))
        raise WorkError(f"cannot {doing} {place}: {reason}. Then continue with --resume") from error


def _download(ref: ArtifactRef, directory: Path) -> None:
    """Fill a directory of our own, then rename it; the first of several processes wins."""
    fs, root = filesystem(ref.uri)
    with explained(str(directory), "download into"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".download-") as partial:
            staging = Path(partial) / directory.name
            for file in ref.files:
                target = _inside(staging, file.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                _download_file(fs, f"{root}/{file.name}", file, target, ref.uri)
            try:
                staging.rename(directory)
            except OSError:
                if not directory.is_dir():
                    raise


def _download_file(fs: FileSystem, path: str, file: FileRef, target: Path, uri: str) -> None:
    try:
        with fs.open_input_stream(path) as reader, target.open("xb") as writer:
            sha256, size_bytes = sha256_of(reader, copy_to=writer)
            _flush_to_disk(writer)
    except FileNotFoundError as error:
        raise _damaged(uri, file.name, "is missing") from error
    if (sha256, size_bytes) != (file.sha256, file.size_bytes):
        raise _damaged(uri, file.name, f"is not what was published ({size_bytes} bytes, SHA-256 {sha256})")


@lru_cache(maxsize=4096)
def _verify_hashes(directory: str, files: tuple[FileRef, ...]) -> None:
    """Read every file once per process; a failure is not remembered."""
    for file in files:
        path = Path(directory) / file.name
        with explained(str(path), "read"), path.open("rb") as reader:
            sha256, _ = sha256_of(reader)
        if sha256 != file.sha256:
            raise _damaged(directory, file.name, f"has SHA-256 {sha256}, not {file.sha256}")


def _damaged(place: str, name: str, what: str) -> WorkError:
    return WorkError(f"artifact file {place}/{name} {what}; delete {place} and run again with --resume")


def _inside(directory: Path, name: str) -> Path:
    """Return `directory / name`; refuse names that would lead out of it."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise WorkError(f"artifact file name {name!r} leads out of its directory; the manifest is not ours")
    return directory / relative


@contextmanager
def _open_atomic(uri: str) -> Iterator[IO[bytes]]:
    fs, path = filesystem(uri)
    with explained(uri, "write"):
        if isinstance(fs, LocalFileSystem):
            with _open_then_rename(Path(path)) as target:
                yield target
        else:
            with fs.open_output_stream(path) as target:
                yield target


@contextmanager
def _open_then_rename(path: Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden and without the final suffix, so that a glob such as *.parquet never matches it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("xb") as target:
            yield target
            _flush_to_disk(target)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _flush_to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def is_temporary(name: str) -> bool:
    """Return true for the name of a file still being written, or left so by a process that ended."""
    return name.startswith(".") and name.endswith(".tmp")
