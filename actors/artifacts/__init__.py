"""Directories of files on a local path, NFS, `s3://` or `gs://`, known by their content."""

from actors.artifacts.filesystem import (
    filesystem,
    is_temporary,
    join,
    list_all,
    list_files,
    local_path,
    patient_filesystem,
    place_and_date,
)
from actors.artifacts.node_cache import cache_dir, cache_entry, file_sha256
from actors.artifacts.objects import (
    create_bytes,
    delete_directory,
    delete_file,
    read_bytes,
    sha256_of,
    stored_files,
    write_bytes,
)
from actors.artifacts.retries import PATIENCE_VARIABLE, attempt, explained, is_transient, patience_s
from actors.artifacts.retrying_filesystem import retrying_filesystem
from actors.artifacts.transfer import fetch, publish, publish_file, without_empty_directories

DRIVER_DIRECTORY = "ITERABRE_DRIVER_DIRECTORY"
"""The variable that holds the driver's directory for workers, which have directories of their own."""

__all__ = [
    "DRIVER_DIRECTORY",
    "PATIENCE_VARIABLE",
    "attempt",
    "cache_dir",
    "cache_entry",
    "create_bytes",
    "delete_directory",
    "delete_file",
    "explained",
    "fetch",
    "file_sha256",
    "filesystem",
    "is_temporary",
    "is_transient",
    "join",
    "list_all",
    "list_files",
    "local_path",
    "patience_s",
    "patient_filesystem",
    "place_and_date",
    "publish",
    "publish_file",
    "read_bytes",
    "retrying_filesystem",
    "sha256_of",
    "stored_files",
    "without_empty_directories",
    "write_bytes",
]
