"""Single files at a URI, written whole or not at all: to a local disk, NFS, S3 or GCS.

On a local file system a file is written under a temporary name, flushed to the disk, then renamed, or
linked where it must not replace another. In an object store it is uploaded as one request, or in parts
that become one object when all are there and are discarded when the upload fails.
"""

import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from actors.artifacts.filesystem import filesystem, local_path, s3_endpoint
from actors.artifacts.retries import attempt
from actors.errors import RequestError, WorkError

if TYPE_CHECKING:
    from obstore.store import GCSStore, S3Store

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 * 2**20
PART_BYTES = 16 * 2**20
MOST_PARTS = 9_000
"""Parts of one upload; S3 takes 10,000."""
PARTS_AT_ONCE = 4

NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""How file systems without hard links refuse one."""


def write_bytes(uri: str, data: bytes, limit_s: float | None = None) -> None:
    """Write one file atomically: a reader sees the old content, the new, or nothing.

    Args:
        limit_s: as in `attempt`.
    """

    def write() -> None:
        if (path := local_path(uri)) is not None:
            with open_then_rename(path) as target:
                target.write(data)
            return
        store, key = _object(uri)
        with _bucket_named(uri):
            store.put(key, data, use_multipart=False)

    attempt(uri, "write", write, limit_s)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write one file atomically if there is none, and return whether this call wrote it.

    Of several that do so at once, on any number of machines, one gets true. A file system without
    hard links cannot promise that for two within the same moment.
    """

    def create() -> bool:
        if (path := local_path(uri)) is not None:
            return _link_new(path, data)
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

        store, key = _object(uri)
        try:
            with _bucket_named(uri):
                store.put(key, data, mode="create")
        except (AlreadyExistsError, PreconditionError):
            return False
        except NotSupportedError:
            log.warning("%s has no conditional writes: two drivers at once may overwrite each other", uri)
            if read_bytes(uri) is not None:
                return False
            store.put(key, data, use_multipart=False)
        return True

    # What is there may be ours: a request arrived, and its answer was lost.
    return attempt(uri, "write", create) or read_bytes(uri) == data


def read_bytes(uri: str, limit_s: float | None = None) -> bytes | None:
    """Return the content of one file, or None if there is no such file."""

    def read() -> bytes | None:
        try:
            if (path := local_path(uri)) is not None:
                return path.read_bytes()
            store, key = _object(uri)
            return bytes(store.get(key).bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None

    return attempt(uri, "read", read, limit_s)


def delete_file(uri: str, limit_s: float | None = None) -> None:
    """Delete one file, if it is there."""

    def delete() -> None:
        if (path := local_path(uri)) is not None:
            path.unlink(missing_ok=True)
            return
        store, key = _object(uri)
        with suppress(FileNotFoundError):
            store.delete(key)

    attempt(uri, "delete", delete, limit_s)


def delete_directory(uri: str) -> None:
    """Delete a directory and all that is in it, if it is there."""

    def delete() -> None:
        fs, path = filesystem(uri)
        with suppress(FileNotFoundError):
            fs.delete_dir(path)

    attempt(uri, "delete", delete)


def write_file(source: Path, uri: str) -> tuple[str, int]:
    """Copy a local file to `uri` atomically; return SHA-256 (hex) and length in bytes of what was copied."""

    def write() -> tuple[str, int]:
        with source.open("rb") as reader:
            if (path := local_path(uri)) is not None:
                with open_then_rename(path) as writer:
                    return sha256_of(reader, copy_to=writer)
            size_bytes = source.stat().st_size
            state, store, key = hashlib.sha256(), *_object(uri)
            with _bucket_named(uri):
                if size_bytes <= PART_BYTES:
                    data = reader.read()
                    state.update(data)
                    store.put(key, data, use_multipart=False)
                    return state.hexdigest(), len(data)
                sent = 0

                def chunks() -> Iterator[bytes]:
                    nonlocal sent
                    while chunk := reader.read(CHUNK_BYTES):
                        state.update(chunk)
                        sent += len(chunk)
                        yield chunk

                part = max(PART_BYTES, size_bytes // MOST_PARTS)
                store.put(key, chunks(), chunk_size=part, max_concurrency=PARTS_AT_ONCE)
                return state.hexdigest(), sent

    return attempt(uri, "write", write)


def stored_files(uri: str) -> dict[str, tuple[int, str | None]]:
    """Return size and ETag (None on a file system) of every file anywhere under `uri`, by its name there."""

    def described() -> dict[str, tuple[int, str | None]]:
        if (root := local_path(uri)) is not None:
            files = (path for path in root.rglob("*") if path.is_file())
            return {path.relative_to(root).as_posix(): (path.stat().st_size, None) for path in files}
        store, key = _object(uri)
        found = (each for batch in store.list(key) for each in batch)
        return {each["path"].removeprefix(f"{key}/"): (each["size"], each["e_tag"]) for each in found}

    return attempt(uri, "list", described)


def sha256_of(stream: IO[bytes], copy_to: IO[bytes] | None = None) -> tuple[str, int]:
    """Return SHA-256 (hex) and length in bytes of a stream, copied to another while it is read."""
    state, size_bytes = hashlib.sha256(), 0
    while chunk := stream.read(CHUNK_BYTES):
        state.update(chunk)
        size_bytes += len(chunk)
        if copy_to is not None:
            copy_to.write(chunk)
    return state.hexdigest(), size_bytes


@contextmanager
def open_then_rename(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`, which takes its place at the end of the body."""
    with _temporary(path) as temporary:
        with temporary.open("xb") as target:
            yield target
            flush_to_disk(target)
        temporary.replace(path)
    _flush_directory(path.parent)


def flush_to_disk(file: IO[bytes]) -> None:
    """Return when what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _link_new(path: Path, data: bytes) -> bool:
    """Create a file with that content if there is none; return whether this call did."""
    with _temporary(path) as temporary:
        with temporary.open("xb") as target:
            target.write(data)
            flush_to_disk(target)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if path.exists():
                return False
            temporary.replace(path)
    _flush_directory(path.parent)
    return True


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden and without the final suffix, so that a glob such as *.parquet never matches it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _flush_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def _bucket_named(uri: str) -> Iterator[None]:
    """Say that the bucket is missing where a write says that the file is."""
    try:
        yield
    except FileNotFoundError as error:
        bucket = uri.partition("://")[2].partition("/")[0]
        raise WorkError(
            f"cannot write {uri}: there is no bucket {bucket!r}, or not for these credentials; create it or "
            "choose another storage path"
        ) from error


def _object(uri: str) -> tuple[Any, str]:
    """Return the bucket of an object as obstore knows it, and the object's key."""
    scheme, _, place = uri.partition("://")
    if scheme not in ("s3", "gs", "gcs"):
        raise RequestError(
            f"cannot use {uri!r} as a storage location; give a local path, s3://, gs:// or file://"
        )
    bucket, _, key = place.partition("/")
    return _bucket(scheme, bucket, os.getpid(), s3_endpoint(), os.environ.get("AWS_ACCESS_KEY_ID")), key


@lru_cache(maxsize=32)
def _bucket(
    scheme: str, bucket: str, _pid: int, endpoint: str | None, key_id: str | None
) -> "S3Store | GCSStore":
    """Connect to a bucket. What it depends on beside its name is in the arguments, so that it is kept."""
    from obstore.store import GCSStore, S3Store

    # Requests of one operation; `attempt` begins the operation again.
    retries: Any = {"max_retries": 2}
    if scheme != "s3":
        return GCSStore(bucket, retry_config=retries)
    fs, _ = filesystem(f"s3://{bucket}")
    provider = None
    if key_id is None:
        # Profiles, single sign-on and roles: what the command line tools of AWS find. Where boto3
        # is missing, obstore finds the roles of machines and containers alone.
        with suppress(ImportError):
            from obstore.auth.boto3 import Boto3CredentialProvider

            try:
                provider = Boto3CredentialProvider()
            except ValueError as error:
                raise WorkError(
                    f"there are no credentials for s3://{bucket}: set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine a role"
                ) from error
    config: Any = {"region": fs.region, **({"endpoint": endpoint} if endpoint else {})}
    options: Any = {"allow_http": (endpoint or "").startswith("http://")}
    return S3Store(
        bucket, config=config, client_options=options, retry_config=retries, credential_provider=provider
    )
