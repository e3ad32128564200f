"""Where text comes from: built-in files, files of the user, data sets of the hub, generated responses.

A text is a list of rows. What a row is depends on the source:

- `.txt`: a line *with* its newline, so that `"".join(rows)` is the file's text;
- `.jsonl`, `.json`, `.csv`, `.parquet` and hub data sets: the text column of one record.

Rows that end their line are lines of running text, in which a document begins at
each heading of the first level (` = Title = `, as WikiText writes them). Any other
row is a document.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetBuilder, IterableDataset, load_dataset, load_dataset_builder

from actors.artifacts import fetch, file_sha256, local_path, place_and_date
from actors.contracts import TextInfo, TextSpec, digest
from actors.data.files import (
    TABLE_READERS,
    Record,
    Table,
    check_suffix,
    parse_table,
    read_file,
    stream_records,
    suffix_of,
)
from actors.errors import RequestError, unknown_name

BUILTIN_TEXTS = ("iterabre-appendix-a", "wikitext-2-raw-test", "wikitext-2-raw-validation")
PLAIN = "plain"
"""Name of the chat template that is no file."""

HEADING = re.compile(r" ?= [^=\n]+ = ?\n?")
LONGEST_DOCUMENT = 2**20
"""Characters after which running text without headings is cut, so that it can be streamed."""


def builtin_file(name: str) -> Path:
    """The file `name` of the data that ships with the package (see builtin/SOURCES.md)."""
    return Path(__file__).resolve().parent / "builtin" / name


def describe_text(spec: TextSpec) -> TextInfo:
    """Check that `spec` can be read, and fingerprint what it refers to.

    The fingerprint is the SHA-256 of a file's bytes (with the columns, where
    there are some), or that of a hub data set's own fingerprint, split and
    columns; where a file lies and what it is called do not matter. Only a
    streamed file at a URI, which is not read twice, is known by place, size and date.

    Raises RequestError: no source or two, unknown built-in, file missing or
    empty, no such column, data set unknown or out of reach.
    """
    if spec.generated is not None:
        return TextInfo(spec, digest([spec.generated.sha256, *_format(spec)]), num_rows=None)
    if spec.streaming:
        next(_checked(_stream(spec), spec))
        return TextInfo(spec, digest(["streamed", _fingerprint(spec, _source_identity(spec))]), num_rows=None)
    records, source = _read(spec)
    num_rows = sum(1 for _ in _checked(records, spec))
    return TextInfo(spec, _fingerprint(spec, source), num_rows)


def load_texts(spec: TextSpec) -> list[str]:
    """The rows of a text, in order. Raises RequestError as `describe_text` does."""
    return [record[spec.text_column] for record in open_records(spec)]


def open_records(spec: TextSpec, seed: int = 0) -> Iterator[Record]:
    """The records of a text, one after another; each has the columns that `spec` names.

    With `spec.streaming` they are read as they are taken. Then a hub data set's
    shards come in an order drawn from `seed`; a file is read from its beginning.

    Raises RequestError: as `describe_text`.
    """
    records = _stream(spec, seed) if spec.streaming else _read(spec)[0]
    return _checked(records, spec)


def documents(rows: Iterable[str]) -> Iterator[str]:
    """The documents that rows make up (see the module), none of them blank."""
    lines: list[str] = []
    length = 0
    for row in rows:
        is_line = row.endswith("\n") or not row
        if lines and (not is_line or length > LONGEST_DOCUMENT or HEADING.fullmatch(row)):
            yield from _joined(lines)
            lines, length = [], 0
        if not is_line:
            yield from _joined([row])
            continue
        lines.append(row)
        length += len(row)
    yield from _joined(lines)


def _joined(lines: list[str]) -> Iterator[str]:
    text = "".join(lines)
    if text.strip():
        yield text


def chat_template_text(choice: str | None) -> str | None:
    """The content of the template file that `TextSpec.chat_template` names; else `choice` itself.

    Raises RequestError if it cannot be read.
    """
    return choice if choice in (None, PLAIN) else read_file(choice).decode()


def _format(spec: TextSpec) -> list[str | None]:
    """How the source is read: part of what a text is."""
    if not spec.conversations:
        return [spec.text_column]
    columns = [spec.prompt_column, spec.input_column, spec.response_column, spec.messages_column]
    return [*columns, chat_template_text(spec.chat_template)]


def _fingerprint(spec: TextSpec, source: str) -> str:
    file = _file_of(spec)
    if file is None:
        return digest([source, spec.split, *_format(spec)])
    return source if suffix_of(file) == ".txt" else digest([source, *_format(spec)])


def _source_identity(spec: TextSpec) -> str:
    file = _file_of(spec)
    if file is None:
        return _hub_builder(spec)._get_dataset_fingerprint(spec.split)
    path = local_path(file)
    return file_sha256(path) if path is not None else place_and_date(file)


def _read(spec: TextSpec) -> tuple[Iterator[Record], str]:
    """All records, and the identity of the source that they come from."""
    if spec.generated is not None:
        directory = fetch(spec.generated)
        parts = [stream_records(str(directory / file.name)) for file in spec.generated.files]
        return chain.from_iterable(parts), spec.generated.sha256
    file = _file_of(spec)
    if file is None:
        dataset = _hub_dataset(spec)
        table = {name: dataset[name] for name in dataset.column_names}
        return _records(table, spec), dataset._fingerprint
    check_suffix(file)
    content = read_file(file)
    return _records(parse_table(content, file), spec), hashlib.sha256(content).hexdigest()


def _records(table: Table, spec: TextSpec) -> Iterator[Record]:
    names = [*_columns(spec), *([spec.input_column] if spec.input_column else [])]
    _check_columns(table, names, spec)
    return (dict(zip(names, row, strict=True)) for row in zip(*(table[name] for name in names), strict=True))


def _stream(spec: TextSpec, seed: int = 0) -> Iterator[Record]:
    file = _file_of(spec)
    if file is not None:
        return stream_records(file)
    dataset = _hub_stream(spec)
    shards = list(range(dataset.num_shards))
    # Only shards are shuffled here: documents of several rows must stay whole.
    random.Random(seed).shuffle(shards)
    return chain.from_iterable(dataset.shard(len(shards), index) for index in shards)


def _columns(spec: TextSpec) -> tuple[str, ...]:
    """The columns that a record must have."""
    if spec.generated is not None:
        return ("prompt", "response")
    if not spec.conversations:
        return (spec.text_column,)
    named = (spec.messages_column,) if spec.messages_column else (spec.prompt_column, spec.response_column)
    return tuple(name for name in named if name)


def _check_columns(there: Iterable[str], names: Iterable[str], spec: TextSpec) -> None:
    fields = ("text_column", "prompt_column", "input_column", "response_column", "messages_column")
    for name in names:
        if name not in there:
            field = next((field for field in fields if getattr(spec, field) == name), "generated")
            raise RequestError(
                f"{spec.path!r} has no column {name!r} ({field}); its columns are: {', '.join(there)}"
            )


def _checked(records: Iterable[Record], spec: TextSpec) -> Iterator[Record]:
    """The records, each found to have its columns; at least one that is not blank."""
    blank = True
    for index, record in enumerate(records):
        _check_columns(record, _columns(spec), spec)
        for name in _columns(spec):
            _check_value(record[name], name, index, spec)
            blank = blank and not str(record[name]).strip()
        yield record
    if blank:
        raise RequestError(f"{spec.path!r}: column {_columns(spec)[0]!r} holds no text in any row")


def _check_value(value: Any, name: str, index: int, spec: TextSpec) -> None:
    """Text, or a list of messages where the column holds such."""
    where = f"{spec.path!r}: row {index} of column {name!r}"
    if name == spec.messages_column or (spec.generated and name == "prompt"):
        if not isinstance(value, list) or not value or not all(_is_message(message) for message in value):
            raise RequestError(f"{where} is no list of messages, each with role and content that are text")
    elif not isinstance(value, str):
        raise RequestError(f"{where} is not text but {type(value).__name__}")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _file_of(spec: TextSpec) -> str | None:
    """The path or URI of the file that `spec` names, or None for a data set that `datasets` loads."""
    if (spec.builtin is None) == (spec.path is None):
        raise RequestError("a text needs exactly one of `builtin` and `path`")
    if spec.builtin is not None:
        if spec.builtin not in BUILTIN_TEXTS:
            raise unknown_name("built-in text", spec.builtin, BUILTIN_TEXTS)
        return str(builtin_file(f"{spec.builtin}.txt"))
    path = spec.path or ""
    if Path(path).expanduser().is_dir():
        return None
    looks_local = path.startswith((".", "/", "~")) or "://" in path or suffix_of(path) in TABLE_READERS
    return path if looks_local or Path(path).is_file() else None


def _hub_dataset(spec: TextSpec) -> Dataset:
    with _hub_errors(spec):
        return load_dataset(_hub_path(spec), spec.config, split=spec.split)


def _hub_builder(spec: TextSpec) -> DatasetBuilder:
    with _hub_errors(spec):
        return load_dataset_builder(_hub_path(spec), spec.config)


def _hub_stream(spec: TextSpec) -> IterableDataset:
    with _hub_errors(spec):
        return load_dataset(_hub_path(spec), spec.config, split=spec.split, streaming=True)


def _hub_path(spec: TextSpec) -> str:
    directory = Path(spec.path or "").expanduser()
    return str(directory) if directory.is_dir() else str(spec.path)


@contextmanager
def _hub_errors(spec: TextSpec) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # unknown id, configuration or split; no network; no access
        where = f"config {spec.config!r}, split {spec.split!r}"
        raise RequestError(
            f"cannot load the data set {spec.path!r} ({where}): {error}. If a local file was meant, "
            f"it does not exist here; give its path with a known ending ({', '.join(TABLE_READERS)})"
        ) from error
