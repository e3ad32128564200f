"""Where text comes from: built-in files, files of the user, data sets of the hub.

A text is a list of rows. What a row is depends on the source:

- `.txt`: a line *with* its newline, so that `"".join(rows)` is the file's text;
- `.jsonl`, `.json`, `.csv`, `.parquet` and hub data sets: the text column of one record.

Files are read where this runs, and may lie at a URI that `pyarrow.fs` opens
(s3://, gs://, ...), for clusters without a shared disk.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as papq
from datasets import Dataset, load_dataset

from actors.contracts import TextInfo, TextSpec, digest
from actors.errors import RequestError, unknown_name

T = TypeVar("T")

BUILTIN_TEXTS = ("iterabre-appendix-a", "wikitext-2-raw-test", "wikitext-2-raw-validation")


def builtin_file(name: str) -> Path:
    """The file `name` of the data that ships with the package (see builtin/SOURCES.md)."""
    return Path(__file__).resolve().parent / "builtin" / name


def describe_text(spec: TextSpec) -> TextInfo:
    """Check that `spec` can be read, and fingerprint what it refers to.

    The fingerprint is the SHA-256 of a file's bytes (with the column, where
    there is one), or that of a hub data set's own fingerprint, split and
    column; where a file lies and what it is called do not matter.

    Raises RequestError: no source or two, unknown built-in, file missing or
    empty, no such column, data set unknown or out of reach.
    """
    rows, fingerprint = _read(spec)
    return TextInfo(spec, fingerprint, num_rows=len(rows))


def load_texts(spec: TextSpec) -> list[str]:
    """The rows of a text, in order. Raises RequestError as `describe_text` does."""
    rows, _ = _read(spec)
    return rows


def _read(spec: TextSpec) -> tuple[list[str], str]:
    """Rows and fingerprint of a text."""
    file = _file_of(spec)
    if file is None:
        dataset = _load_hub(spec)
        rows = _text_column({name: dataset[name] for name in dataset.column_names}, spec)
        return rows, digest([dataset._fingerprint, spec.split, spec.text_column])
    content = _read_bytes(file)
    sha256 = hashlib.sha256(content).hexdigest()
    if _suffix(file) == ".txt":
        return _parse(content, file, _lines), sha256
    columns = _parse(content, file, _column_reader(file))
    return _text_column(columns, spec), digest([sha256, spec.text_column])


def _file_of(spec: TextSpec) -> str | None:
    """The path or URI of the file that `spec` names, or None for a hub data set."""
    if (spec.builtin is None) == (spec.path is None):
        raise RequestError("a text needs exactly one of `builtin` and `path`")
    if spec.builtin is not None:
        if spec.builtin not in BUILTIN_TEXTS:
            raise unknown_name("built-in text", spec.builtin, BUILTIN_TEXTS)
        return str(builtin_file(f"{spec.builtin}.txt"))
    path = spec.path or ""
    looks_local = path.startswith((".", "/", "~")) or "://" in path or _suffix(path) in _SUFFIXES
    return path if looks_local or Path(path).is_file() else None


def _suffix(file: str) -> str:
    return Path(file).suffix.lower()


def _read_bytes(file: str) -> bytes:
    try:
        if "://" in file:
            filesystem, path = pafs.FileSystem.from_uri(file)
            with filesystem.open_input_stream(path) as stream:
                content = stream.read()
        else:
            content = Path(file).expanduser().read_bytes()
    except (OSError, pa.ArrowInvalid) as error:
        raise RequestError(f"cannot read the text file {file!r}: {error}") from error
    if not content.strip():
        raise RequestError(f"the text file {file!r} is empty")
    return content


def _parse(content: bytes, file: str, reader: Callable[[bytes], T]) -> T:
    try:
        return reader(content)
    except (ValueError, pa.ArrowInvalid) as error:
        raise RequestError(f"{file!r} is not a valid {_suffix(file)} file: {error}") from error


def _lines(content: bytes) -> list[str]:
    # Not str.splitlines: it also cuts at form feeds and Unicode separators inside a sentence.
    lines = content.decode().replace("\r\n", "\n").split("\n")
    return [line + "\n" for line in lines[:-1]] + lines[-1:] * bool(lines[-1])


def _columns_of(records: Iterable[Any]) -> dict[str, list[Any]]:
    records = list(records)
    if not all(isinstance(record, dict) for record in records):
        raise ValueError("every record must be a JSON object")
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _read_jsonl(content: bytes) -> dict[str, list[Any]]:
    return _columns_of(json.loads(line) for line in content.decode().split("\n") if line.strip())


def _read_json(content: bytes) -> dict[str, list[Any]]:
    return _columns_of(json.loads(content))


def _read_csv(content: bytes) -> dict[str, list[Any]]:
    options = pacsv.ParseOptions(newlines_in_values=True)
    return pacsv.read_csv(pa.BufferReader(content), parse_options=options).to_pydict()


def _read_parquet(content: bytes) -> dict[str, list[Any]]:
    return papq.read_table(pa.BufferReader(content)).to_pydict()


_COLUMN_READERS: dict[str, Callable[[bytes], dict[str, list[Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_SUFFIXES = (".txt", *_COLUMN_READERS)


def _column_reader(file: str) -> Callable[[bytes], dict[str, list[Any]]]:
    reader = _COLUMN_READERS.get(_suffix(file))
    if reader is None:
        raise RequestError(f"cannot tell what {file!r} holds: its name must end with {', '.join(_SUFFIXES)}")
    return reader


def _text_column(columns: dict[str, Any], spec: TextSpec) -> list[str]:
    """The text column of a table; every value must be a string."""
    name = spec.text_column
    if name not in columns:
        there = ", ".join(columns)
        raise RequestError(f"{spec.path!r} has no column {name!r} (text_column); its columns are: {there}")
    rows = list(columns[name])
    bad = next((i for i, row in enumerate(rows) if not isinstance(row, str)), None)
    if bad is not None:
        kind = type(rows[bad]).__name__
        raise RequestError(f"{spec.path!r}: row {bad} of column {name!r} is not text but {kind}")
    if not any(row.strip() for row in rows):
        raise RequestError(f"{spec.path!r}: column {name!r} holds no text in any row")
    return rows


def _load_hub(spec: TextSpec) -> Dataset:
    try:
        return load_dataset(spec.path, spec.config, split=spec.split)
    except (OSError, ValueError) as error:  # unknown id, configuration or split; no network; no access
        where = f"config {spec.config!r}, split {spec.split!r}"
        raise RequestError(
            f"cannot load the data set {spec.path!r} ({where}): {error}. If a local file was meant, "
            f"it does not exist here; give its path with a known ending ({', '.join(_SUFFIXES)})"
        ) from error
