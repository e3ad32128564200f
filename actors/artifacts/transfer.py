"""Artifacts between a local directory and where a run lies: published with their hashes, fetched verified."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath

from actors.artifacts.filesystem import filesystem, join, local_path
from actors.artifacts.node_cache import artifact_entry, file_sha256, filling, make_space
from actors.artifacts.objects import flush_to_disk, sha256_of, write_file
from actors.artifacts.retries import attempt, explained
from actors.contracts import ArtifactRef, FileRef
from actors.errors import DamagedArtifactError, WorkError


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
        sha256, size_bytes = write_file(local_dir / name, join(uri, name))
        files.append(FileRef(name, size_bytes, sha256))
    return ArtifactRef(uri=uri, files=tuple(files))


def publish_file(file: Path, uri: str) -> FileRef:
    """Copy one file under its own name to the artifact at `uri`, of which others publish the rest.

    Raises:
        WorkError: the target cannot be written.
    """
    sha256, size_bytes = write_file(file, join(uri, file.name))
    return FileRef(file.name, size_bytes, sha256)


def fetch(ref: ArtifactRef, remember: bool = False) -> Path:
    """Return a local directory that holds the files of `ref`, verified.

    A local artifact is used where it is. Any other is downloaded once per node into the cache under the
    hash of its content, by the first process that needs it, and stays there while a process uses it.

    Args:
        remember: for large files, which many processes read in part: do not read a file to verify it whose
            hash this node knows, as long as it is left alone.

    Raises:
        DamagedArtifactError: a file is missing or is not what was published.
        WorkError: the artifact cannot be seen from here, or not be stored here.
    """
    directory = local_path(ref.uri)
    if directory is not None:
        if not directory.is_dir():
            raise WorkError(
                f"artifact {ref.uri} is not on this machine; with several nodes the storage path "
                "must be one that all of them see (NFS, s3:// or gs://)"
            )
        _check(directory, ref, remember)
        return directory
    directory = artifact_entry(ref.sha256)
    with filling(directory):
        if not directory.is_dir():
            _download(ref, directory)
    try:
        _check(directory, ref, remember)
    except DamagedArtifactError:  # the copy of this node alone, perhaps
        with filling(directory):
            shutil.rmtree(directory, ignore_errors=True)
            _download(ref, directory)
        _check(directory, ref, remember)
    return directory


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


def _check(directory: Path, ref: ArtifactRef, remember: bool) -> None:
    for file in ref.files:
        path = _inside(directory, file.name)
        if not path.is_file():
            raise _damaged(ref.uri, file.name, "is missing")
        if path.stat().st_size != file.size_bytes:
            found = f"has {path.stat().st_size} bytes, not {file.size_bytes}"
            raise _damaged(ref.uri, file.name, found)
    _verify_hashes(str(directory), ref, remember)


def _download(ref: ArtifactRef, directory: Path) -> None:
    """Fill a directory of our own, then rename it; the first of several processes wins."""
    with explained(str(directory), "download into"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        make_space(sum(file.size_bytes for file in ref.files))
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".download-") as partial:
            staging = Path(partial) / directory.name
            for file in ref.files:
                target = _inside(staging, file.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                _download_file(ref, file, target)
            try:
                staging.rename(directory)
            except OSError:
                if not directory.is_dir():
                    raise


def _download_file(ref: ArtifactRef, file: FileRef, target: Path) -> None:
    def download() -> tuple[str, int]:
        fs, root = filesystem(ref.uri)
        with fs.open_input_stream(f"{root}/{file.name}") as reader, target.open("wb") as writer:
            found = sha256_of(reader, copy_to=writer)
            flush_to_disk(writer)
            return found

    try:
        sha256, size_bytes = attempt(join(ref.uri, file.name), "read", download)
    except FileNotFoundError as error:
        raise _damaged(ref.uri, file.name, "is missing") from error
    if (sha256, size_bytes) != (file.sha256, file.size_bytes):
        raise _damaged(
            ref.uri, file.name, f"is not what was published ({size_bytes} bytes, SHA-256 {sha256})"
        )


@lru_cache(maxsize=4096)
def _verify_hashes(directory: str, ref: ArtifactRef, remember: bool) -> None:
    """Read every file once per process, or once per node; a failure is not remembered."""
    for file in ref.files:
        path = Path(directory) / file.name

        def read(path: Path = path) -> str:
            if remember:
                return file_sha256(path)
            with path.open("rb") as reader:
                return sha256_of(reader)[0]

        sha256 = attempt(str(path), "read", read)
        if sha256 != file.sha256:
            raise _damaged(ref.uri, file.name, f"has SHA-256 {sha256}, not {file.sha256}")


def _damaged(uri: str, name: str, what: str) -> DamagedArtifactError:
    return DamagedArtifactError(
        f"artifact file {uri}/{name} {what}; delete {uri} and run again with --resume", uri
    )


def _inside(directory: Path, name: str) -> Path:
    """Return `directory / name`; refuse names that would lead out of it."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise WorkError(f"artifact file name {name!r} leads out of its directory; the manifest is not ours")
    return directory / relative
