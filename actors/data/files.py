"""Reading text files and tables, whole or a record at a time.

Files may lie on the local disk or at a URI that `pyarrow.fs` opens (s3://,
gs://, ...), for clusters without a shared disk. A `.txt` file is a table of one
column, `text`, with a record a line.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as papq

from actors.artifacts import filesystem
from actors.errors import RequestError

Record = dict[str, Any]
Table = dict[str, list[Any]]

LINE_COLUMN = "text"
"""Column of the lines of a `.txt` file."""


def suffix_of(file: str) -> str:
    """The file's ending, in lower case."""
    return Path(file).suffix.lower()


def check_suffix(file: str) -> None:
    """Raises RequestError if the file's ending does not tell what it holds."""
    if suffix_of(file) not in TABLE_READERS:
        endings = ", ".join(TABLE_READERS)
        raise RequestError(f"cannot tell what {file!r} holds: its name must end with {endings}")


def read_file(file: str) -> bytes:
    """The file's content. Raises RequestError if it cannot be read or is blank."""
    with _open(file) as stream, _explained(file):
        content = stream.read()
    if not content.strip():
        raise RequestError(f"the text file {file!r} is empty")
    return content


def parse_table(content: bytes, file: str) -> Table:
    """All records of a file, as columns. Raises RequestError if it is not what its ending says."""
    check_suffix(file)
    with _explained(file):
        return TABLE_READERS[suffix_of(file)](content)


def stream_records(file: str) -> Iterator[Record]:
    """The records of a file one after another, a small part of it in memory at a time.

    Raises:
        RequestError: the file cannot be read, or its format only as a whole (`.json`).
    """
    check_suffix(file)
    reader = RECORD_READERS.get(suffix_of(file))
    if reader is None:
        raise RequestError(f"{file!r} cannot be streamed, a .json file is one value; write it as .jsonl")
    with _open(file) as stream, _explained(file):
        yield from reader(stream)


@contextmanager
def _open(file: str) -> Iterator[pa.NativeFile]:
    with _explained(file):
        source, path = filesystem(file)
        opened = source.open_input_file(path)
    with opened:
        yield opened


@contextmanager
def _explained(file: str) -> Iterator[None]:
    try:
        yield
    except pa.ArrowInvalid as error:
        raise RequestError(f"{file!r} is not a valid {suffix_of(file)} file: {error}") from error
    except OSError as error:
        raise RequestError(f"cannot read the text file {file!r}: {error}") from error
    except ValueError as error:
        raise RequestError(f"{file!r} is not a valid {suffix_of(file)} file: {error}") from error


def _as_columns(values: Iterable[Any]) -> Table:
    records = [_object(value) for value in values]
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _object(value: Any) -> Record:
    if not isinstance(value, dict):
        raise ValueError("every record must be a JSON object")
    return value


def _read_txt(content: bytes) -> Table:
    # Not str.splitlines: it also cuts at form feeds and Unicode separators inside a sentence.
    lines = content.decode().replace("\r\n", "\n").split("\n")
    return {LINE_COLUMN: [line + "\n" for line in lines[:-1]] + lines[-1:] * bool(lines[-1])}


def _read_jsonl(content: bytes) -> Table:
    return _as_columns(json.loads(line) for line in content.decode().split("\n") if line.strip())


def _read_json(content: bytes) -> Table:
    return _as_columns(json.loads(content))


def _read_csv(content: bytes) -> Table:
    return pacsv.read_csv(pa.BufferReader(content), parse_options=CSV_OPTIONS).to_pydict()


def _read_parquet(content: bytes) -> Table:
    return papq.read_table(pa.BufferReader(content)).to_pydict()


def _lines(stream: pa.NativeFile) -> Iterator[str]:
    with TextIOWrapper(BufferedReader(stream), encoding="utf-8", newline="\n") as text:
        for line in text:
            yield line.replace("\r\n", "\n")


def _stream_txt(stream: pa.NativeFile) -> Iterator[Record]:
    return ({LINE_COLUMN: line} for line in _lines(stream))


def _stream_jsonl(stream: pa.NativeFile) -> Iterator[Record]:
    return (_object(json.loads(line)) for line in _lines(stream) if line.strip())


def _stream_csv(stream: pa.NativeFile) -> Iterator[Record]:
    for batch in pacsv.open_csv(stream, parse_options=CSV_OPTIONS):
        yield from batch.to_pylist()


def _stream_parquet(stream: pa.NativeFile) -> Iterator[Record]:
    for batch in papq.ParquetFile(stream).iter_batches(batch_size=ROWS_AT_A_TIME):
        yield from batch.to_pylist()


ROWS_AT_A_TIME = 256
CSV_OPTIONS = pacsv.ParseOptions(newlines_in_values=True)

TABLE_READERS: dict[str, Callable[[bytes], Table]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
RECORD_READERS: dict[str, Callable[[pa.NativeFile], Iterator[Record]]] = {
    ".txt": _stream_txt,
    ".jsonl": _stream_jsonl,
    ".csv": _stream_csv,
    ".parquet": _stream_parquet,
}
