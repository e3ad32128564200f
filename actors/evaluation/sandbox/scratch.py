"""A directory for a program that is not trusted: how much it holds, and how to be rid of it.

A program may nest directories deeper than a path can name, give them modes that
forbid reading, and keep files that it has removed.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def scratch_directory() -> Iterator[str]:
    """Yield the path of an empty directory that is removed afterwards, whatever is in it then."""
    directory = tempfile.mkdtemp(prefix="iterabre-")
    try:
        yield directory
    finally:
        try:
            remove_tree(directory)
        except OSError as error:
            logger.warning("%s is left behind: %s", directory, error)


def remove_tree(directory: str) -> None:
    """Remove a directory of ours, however deep and whatever the modes of what is in it.

    Goes down and up by one step at a time, from an open directory to the next, so
    that no path grows long and nothing recurses.
    """
    names: list[str] = []
    here = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while True:
            if child := _unlink_files(here):
                os.chmod(child, 0o700, dir_fd=here)
                here = _step(here, child)
                names.append(child)
            elif names:
                here = _step(here, "..")
                os.rmdir(names.pop(), dir_fd=here)
            else:
                break
    finally:
        os.close(here)
    os.rmdir(directory)


def _unlink_files(directory: int) -> str | None:
    """Remove files from an open directory up to its first directory; return that, or None if it is empty."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return entry.name
            os.unlink(entry.name, dir_fd=directory)
    return None


def _step(directory: int, name: str) -> int:
    """Open a directory from another, in its place."""
    reached = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
    os.close(directory)
    return reached


def usage(directory: str, pid: int, most_files: int, most_bytes: int) -> tuple[int, int]:
    """Return the bytes and the number of files in a directory that process `pid` writes to.

    Files that are removed and still held by the process count, too: those that it
    has open with their size, those that it has only mapped with `most_bytes` each.
    Counting ends after `most_files`.

    Raises:
        OSError: a directory cannot be read, or lies too deep to be named.
    """
    total, files = 0, 0
    for size in chain(_sizes(directory), _removed_sizes(directory, pid, most_bytes)):
        total, files = total + size, files + 1
        if files > most_files:
            break
    return total, files


def _sizes(directory: str) -> Iterator[int]:
    waiting = [directory]
    while waiting:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                with suppress(FileNotFoundError):  # removed since it was listed
                    yield _size(entry.stat(follow_symlinks=False))


def _removed_sizes(directory: str, pid: int, mapped_bytes: int) -> Iterator[int]:
    process = Path("/proc", str(pid))
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it is ending
        for descriptor in os.scandir(process / "fd"):
            with suppress(FileNotFoundError):
                info = descriptor.stat()
                if not info.st_nlink:
                    yield _size(info)
        for mapping in (process / "maps").read_bytes().splitlines():
            if mapping.endswith(b" (deleted)") and os.fsencode(directory) in mapping:
                yield mapped_bytes


def _size(info: os.stat_result) -> int:
    """Return a file's size on disk; a file system may count its blocks late, and a sparse file has few."""
    return max(info.st_size, info.st_blocks * 512)
