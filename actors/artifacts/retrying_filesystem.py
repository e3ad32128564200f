"""A pyarrow file system for libraries that write to storage themselves and try nothing again.

Ray Train stores checkpoints through it, and Ray Tune its state. Calls are tried again as in `attempt`; a
file is collected on the local disk and uploaded when it is closed, so that it is there whole or not at all.
"""

import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import NativeFile, OSFile, PythonFile
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileSystemHandler, PyFileSystem

from actors.artifacts.filesystem import local_path, patient_filesystem
from actors.artifacts.objects import write_file
from actors.artifacts.retries import attempt

T = TypeVar("T")


def retrying_filesystem(uri: str) -> tuple[FileSystem | None, str]:
    """Return a file system for `uri` and the path within it; none, and `uri`, on a local file system.

    It can be sent to other processes, which use their own credentials.
    """
    if local_path(uri) is not None:
        return None, uri
    scheme, _, path = uri.partition("://")
    return PyFileSystem(RetryingHandler(scheme, path.partition("/")[0])), path.rstrip("/")


class RetryingHandler(FileSystemHandler):
    """What pyarrow calls, for one bucket."""

    def __init__(self, scheme: str, bucket: str):
        self._scheme, self._bucket = scheme, bucket

    def __reduce__(self) -> tuple[Any, ...]:
        return RetryingHandler, (self._scheme, self._bucket)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RetryingHandler) and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash((self._scheme, self._bucket))

    @cached_property
    def _fs(self) -> FileSystem:
        return patient_filesystem(f"{self._scheme}://{self._bucket}")[0]

    def _attempt(self, path: str, doing: str, operation: Callable[[], T]) -> T:
        return attempt(f"{self._scheme}://{path}", doing, operation)

    def get_type_name(self) -> str:
        return f"retrying-{self._scheme}"

    def normalize_path(self, path: str) -> str:
        return self._fs.normalize_path(path)

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return self._attempt(paths[0] if paths else "", "look for", lambda: self._fs.get_file_info(paths))

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        return self._attempt(selector.base_dir, "list", lambda: self._fs.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self._attempt(path, "create", lambda: self._fs.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._attempt(path, "delete", lambda: self._fs.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        def delete() -> None:
            self._fs.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

        self._attempt(path, "delete", delete)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("a bucket is not emptied")

    def delete_file(self, path: str) -> None:
        self._attempt(path, "delete", lambda: self._fs.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        self._attempt(src, "move", lambda: self._fs.move(src, dest))

    def copy_file(self, src: str, dest: str) -> None:
        self._attempt(src, "copy", lambda: self._fs.copy_file(src, dest))

    def open_input_stream(self, path: str) -> NativeFile:
        return self._attempt(path, "read", lambda: self._fs.open_input_stream(path))

    def open_input_file(self, path: str) -> NativeFile:
        return self._attempt(path, "read", lambda: self._fs.open_input_file(path))

    def open_output_stream(self, path: str, metadata: Any) -> NativeFile:
        return PythonFile(_Upload(f"{self._scheme}://{path}"), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> NativeFile:
        raise NotImplementedError("objects cannot be appended to")


class _Upload:
    """A file on the local disk that is uploaded when it is closed."""

    def __init__(self, uri: str):
        self._uri = uri
        self._directory = tempfile.TemporaryDirectory(prefix="iterabre-upload-")
        self._file = Path(self._directory.name) / "content"
        self._stream = OSFile(str(self._file), "wb")
        self.closed = False

    def write(self, data: bytes) -> int:
        return self._stream.write(data)

    def tell(self) -> int:
        return self._stream.tell()

    def flush(self) -> None:
        """Nothing is visible before the end."""

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        try:
            self._stream.close()
            write_file(self._file, self._uri)
        finally:
            self._directory.cleanup()
