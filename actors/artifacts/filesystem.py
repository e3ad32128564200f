"""Which file system holds a URI, and what is listed there."""

import os
from pathlib import Path

from pyarrow import ArrowInvalid
from pyarrow.fs import (
    AwsStandardS3RetryStrategy,
    FileInfo,
    FileSelector,
    FileSystem,
    FileType,
    LocalFileSystem,
    S3FileSystem,
)

from actors.artifacts.retries import attempt
from actors.contracts import digest
from actors.errors import RequestError


def filesystem(uri: str) -> tuple[FileSystem, str]:
    """Return the file system that holds `uri`, and the path within it (absolute if local).

    The endpoint of an S3-compatible store is read from `AWS_ENDPOINT_URL`.
    """
    if "://" not in uri:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return FileSystem.from_uri(uri)
    except ArrowInvalid as error:
        raise RequestError(
            f"cannot use {uri!r} as a storage location ({error}); give a local path, s3://, gs:// or file://"
        ) from error


def patient_filesystem(uri: str, attempts: int = 40) -> tuple[FileSystem, str]:
    """Return the file system of `uri` for code that cannot try again itself, and the path within it.

    On S3, a request that fails for a passing reason is sent again, after growing pauses, so many times.
    """
    fs, path = attempt(uri, "reach", lambda: filesystem(uri))
    if not isinstance(fs, S3FileSystem) or "?" in uri or "@" in uri:  # it has options of its own
        return fs, path
    retries = AwsStandardS3RetryStrategy(max_attempts=attempts)
    return S3FileSystem(region=fs.region, endpoint_override=s3_endpoint(), retry_strategy=retries), path


def s3_endpoint() -> str | None:
    """Return the address of an S3-compatible store, or None for Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def local_path(uri: str) -> Path | None:
    """Return `uri` as a path of the local file system, or None if it lies elsewhere."""
    if "://" not in uri:
        return Path(os.path.abspath(os.path.expanduser(uri)))
    return Path(filesystem(uri)[1]) if _scheme(uri) == "file" else None


def _scheme(uri: str) -> str:
    scheme = uri.partition("://")[0]
    if scheme not in ("s3", "gs", "gcs"):
        filesystem(uri)  # refuses what is none
    return scheme


def join(uri: str, *names: str) -> str:
    """Return `uri` with path components appended."""
    return "/".join((uri.rstrip("/"), *names))


def list_files(uri: str, recursive: bool = False) -> list[FileInfo]:
    """Return the files directly (or anywhere) under `uri`, by path; empty if nothing is there.

    Files still being written are not listed.
    """
    found = list_all(uri, recursive)
    files = (info for info in found if info.type == FileType.File and not is_temporary(info.base_name))
    return sorted(files, key=lambda info: info.path)


def list_all(uri: str, recursive: bool = False) -> list[FileInfo]:
    """Return files and directories directly (or anywhere) under `uri`; empty if nothing is there."""

    def listed() -> list[FileInfo]:
        fs, path = filesystem(uri)
        return fs.get_file_info(FileSelector(path, recursive=recursive, allow_not_found=True))

    return attempt(uri, "list", listed)


def place_and_date(uri: str) -> str:
    """Return a hash of a file's place, size and time of change, without reading it."""

    def described() -> FileInfo:
        fs, path = filesystem(uri)
        return fs.get_file_info([path])[0]

    info = attempt(uri, "read", described)
    return digest([uri, info.size, str(info.mtime)])


def is_temporary(name: str) -> bool:
    """Return true for the name of a file still being written, or left so by a process that ended."""
    return name.startswith(".") and name.endswith(".tmp")
