"""Reading text files and tables, a record at a time.

Files may lie on the local disk or at a URI that `pyarrow.fs` opens (s3://,
gs://, ...), for clusters without a shared disk. A `.txt` file is a table of one
column, `text`, with a record a line. A byte order mark is no part of a text.
"""

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from io import BufferedReader, BytesIO, StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as papq

from actors.artifacts import explained, is_transient, patient_filesystem
from actors.errors import IterabreError, RequestError

Record = dict[str, Any]
Row = tuple[int | None, Record]
"""The line that a record begins in, from 1 (None where a file has no lines), and its columns."""

LINE_COLUMN = "text"
"""Column of the lines of a `.txt` file."""

ROWS_PER_BATCH = 256

COMPRESSED = (".bz2", ".gz", ".lz4", ".xz", ".zip", ".zst")

NO_RECORD = "every record must be a JSON object"

CSV_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")


def suffix_of(file: str) -> str:
    """Return the file's suffix, in lower case."""
    return Path(file).suffix.lower()


def check_suffix(file: str) -> None:
    """Check that the file's suffix is that of a format that can be read; else RequestError."""
    if suffix_of(file) in COMPRESSED:
        raise RequestError(f"{file!r} is compressed; unpack it and give the path of the file that it holds")
    if suffix_of(file) not in READERS:
        endings = ", ".join(READERS)
        raise RequestError(f"cannot tell what {file!r} holds: its name must end with {endings}")


def read_file(file: str) -> bytes:
    """Return the file's content. Raises RequestError if it cannot be read or is blank."""
    with _open(file) as stream, _reader_errors(file):
        content = stream.read()
    if not content.strip():
        raise RequestError(f"the text file {file!r} is empty")
    return content


def read_text(file: str) -> str:
    """Return the file's content as text, with the line ends that it has.

    Raises:
        RequestError: it cannot be read, is blank, or is not UTF-8; names the place.
    """
    content = read_file(file)
    with _reader_errors(file):
        return "".join(_decode_lines(BytesIO(content)))


def parse_rows(content: bytes, file: str, columns: Collection[str] = ()) -> Iterator[Row]:
    """Yield the records of a file that was read, with at least `columns` of those that it has.

    Raises:
        RequestError: it is not of its suffix's format; names the line or row.
    """
    check_suffix(file)
    with _reader_errors(file), pa.BufferReader(content) as stream:
        yield from READERS[suffix_of(file)](stream, columns)


def stream_rows(file: str, columns: Collection[str] = ()) -> Iterator[Row]:
    """Yield what `parse_rows` yields, with a small part of the file in memory at a time.

    Raises:
        RequestError: the file cannot be read, or its format only as a whole (`.json`).
    """
    check_suffix(file)
    if suffix_of(file) == ".json":
        raise RequestError(f"{file!r} cannot be streamed, a .json file is one value; write it as .jsonl")
    with _open(file) as stream, _reader_errors(file):
        yield from READERS[suffix_of(file)](stream, columns)


def read_rows(file: str) -> Iterator[Row]:
    """Yield the records of a file of any format, with as little of it in memory as its format allows."""
    return parse_rows(read_file(file), file) if suffix_of(file) == ".json" else stream_rows(file)


def first_line(file: str) -> bytes:
    """Return the bytes up to and with the first newline."""
    with _open(file) as stream, _reader_errors(file):
        return BufferedReader(stream).readline()


@contextmanager
def _open(file: str) -> Iterator[pa.NativeFile]:
    with _reader_errors(file):
        source, path = patient_filesystem(file)
        opened = source.open_input_file(path)
    with opened:
        yield opened


@contextmanager
def _reader_errors(file: str) -> Iterator[None]:
    """Turn what a reader raises into a RequestError that names the file, and what the reader names."""
    try:
        yield
    except (IterabreError, MemoryError):
        raise
    except OSError as error:
        if is_transient(error):
            with explained(file, "read"):
                raise
        raise RequestError(f"cannot read the text file {file!r}: {one_line_reason(error)}") from error
    except Exception as error:
        raise RequestError(
            f"{file!r} is not a valid {suffix_of(file)} file: {one_line_reason(error)}"
        ) from error


def one_line_reason(error: BaseException) -> str:
    """Return a library's error message in one line; its type if it is empty or only a value."""
    message = " ".join(str(error).split())
    if isinstance(error, RecursionError):
        return "values are nested too deeply"
    speaks = message and not isinstance(error, AssertionError | KeyError | ImportError)
    return message if speaks else f"{type(error).__name__}: {message}".rstrip(": ")


def _decode_lines(stream: pa.NativeFile | BytesIO) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends, each ended by a newline but perhaps the last."""
    offset = 0
    for number, raw in enumerate(BufferedReader(stream), start=1):
        if offset == 0 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("byte 0: the byte order mark of UTF-16; save the file as UTF-8")
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            place = f"line {number}, byte {offset + error.start} of the file"
            byte = f"0x{raw[error.start]:02X}"
            raise ValueError(f"{place}: {byte} is not UTF-8; save the file as UTF-8") from error
        if "\0" in line:
            place = f"line {number}, byte {offset + raw.index(0)} of the file"
            raise ValueError(f"{place}: a zero byte, as in UTF-16 or what is no text; save it as UTF-8")
        yield line.removeprefix("\ufeff") if offset == 0 else line
        offset += len(raw)


def _lines(stream: pa.NativeFile) -> Iterator[str]:
    r"""Yield the lines of a text file, ended by `\n` where they were by `\r\n`.

    Only in a file without any `\n` do lines end with `\r`, as old Macs wrote them.
    """
    # Not str.splitlines: it also cuts at form feeds and Unicode separators inside a sentence.
    for number, line in enumerate(_decode_lines(stream)):
        if number == 0 and not line.endswith("\n"):
            yield from StringIO(line.replace("\r", "\n"), newline="\n")
        else:
            yield line[:-2] + "\n" if line.endswith("\r\n") else line


def _read_txt(stream: pa.NativeFile, _columns: Collection[str]) -> Iterator[Row]:
    for number, line in enumerate(_lines(stream), start=1):
        yield number, {LINE_COLUMN: line}


def _read_jsonl(stream: pa.NativeFile, _columns: Collection[str]) -> Iterator[Row]:
    for number, line in enumerate(_lines(stream), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.rstrip("\n"), object_pairs_hook=_unique_keys)
            if not isinstance(record, dict):
                raise ValueError(f"{NO_RECORD}, not {type(record).__name__}")
        except Exception as error:
            whole = number == 1 and (line.strip() == "{" or line.startswith("["))
            hint = "; a file that is one JSON value must end with .json" if whole else ""
            if isinstance(error, json.JSONDecodeError):
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}{hint}") from error
            raise ValueError(f"line {number}: {one_line_reason(error)}{hint}") from error
        yield number, record


def _read_json(stream: pa.NativeFile, _columns: Collection[str]) -> Iterator[Row]:
    try:
        value = json.loads("".join(_decode_lines(stream)), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        lines = "; a file with a record a line must end with .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}{lines}") from error
    if not isinstance(value, list):
        kind = f"an object with {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"it holds {kind}, not a list of records, each a JSON object")
    for row, item in enumerate(value):
        if not isinstance(item, dict):
            raise ValueError(f"row {row}: {NO_RECORD}, not {type(item).__name__}")
        yield None, item


def _unique_keys(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"an object names {_duplicates([name for name, _ in pairs])} twice")
    return record


def _duplicates(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name, count in Counter(names).items() if count > 1)


def _read_csv(stream: pa.NativeFile, _columns: Collection[str]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    lines = ([line] if "\r" not in line else CSV_LINE.findall(line) for line in _decode_lines(stream))
    reader = csv.reader(chain.from_iterable(lines), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"line {line}: {error}") from error
        if cells is None:
            return
        if not cells:
            continue
        if not header:
            header = cells
            if repeated := _duplicates([name for name in header if name]):
                raise ValueError(f"line {line}: the header names {repeated} twice")
            continue
        if len(cells) != len(header):
            raise ValueError(f"line {line} has {len(cells)} cells, the header {len(header)}")
        yield line, dict(zip(header, cells, strict=True))


def _read_parquet(stream: pa.NativeFile, columns: Collection[str]) -> Iterator[Row]:
    table = papq.ParquetFile(stream)
    names = table.schema_arrow.names
    if repeated := _duplicates(names):
        raise ValueError(f"it has the column {repeated} twice")
    # Where one is missing, all are read, so that the caller's error can list what there is.
    wanted = list(columns) if columns and set(columns) <= set(names) else names
    row = 0
    batches = table.iter_batches(batch_size=ROWS_PER_BATCH, columns=wanted)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            raise ValueError(f"damaged at or after row {row}: {one_line_reason(error)}") from error
        if batch is None:
            return
        yield from ((None, record) for record in _records_of(batch, row))
        row += batch.num_rows


def _records_of(batch: pa.RecordBatch, first_row: int) -> list[Record]:
    try:
        return batch.to_pylist()
    except Exception:
        for index in range(batch.num_rows):  # only to say which row it is
            try:
                batch.slice(index, 1).to_pylist()
            except Exception as error:
                raise ValueError(f"row {first_row + index}: {one_line_reason(error)}") from error
        raise


READERS: dict[str, Callable[[pa.NativeFile, Collection[str]], Iterator[Row]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def is_normalized(first: bytes) -> bool:
    """Return whether a `.txt` file with this first line has a byte order mark or line ends of old Macs."""
    return first.startswith(b"\xef\xbb\xbf") or (b"\r" in first and not first.endswith(b"\n"))
