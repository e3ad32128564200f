"""Sources of text: built-in files, files of the user, data sets of the hub, generated responses.

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
import socket
from collections.abc import Iterable, Iterator
from dataclasses import replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

from actors.artifacts import fetch, file_sha256, local_path, place_and_date
from actors.contracts import TextInfo, TextSpec, digest
from actors.data.bad_rows import RowTally
from actors.data.files import (
    READERS,
    Record,
    Row,
    check_suffix,
    first_line,
    is_normalized,
    parse_rows,
    read_file,
    read_text,
    stream_rows,
    suffix_of,
)
from actors.data.hf_datasets import (
    dataset_commit,
    dataset_errors,
    dataset_fingerprint,
    open_dataset,
    stream_dataset,
)
from actors.errors import ChangedError, RequestError, unknown_name

BUILTIN_TEXTS = ("iterabre-appendix-a", "wikitext-2-raw-test", "wikitext-2-raw-validation")
PLAIN = "plain"
"""Name of the chat template that is no file."""

HEADING = re.compile(r" ?= [^=\n]+ = ?\n?")
LONGEST_DOCUMENT = 2**20
"""Characters after which running text without headings is cut, so that it can be streamed."""


def builtin_file(name: str) -> Path:
    """Return the path of a file that ships with the package (see builtin/SOURCES.md)."""
    return Path(__file__).resolve().parent / "builtin" / name


def describe_text(spec: TextSpec) -> TextInfo:
    """Check that `spec` can be read, and fingerprint what it refers to.

    The fingerprint is the SHA-256 of a file's bytes (with the columns, where
    there are some), or that of a hub data set's own fingerprint, split and
    columns; where a file lies and what it is called do not matter. Only a
    streamed file at a URI, which is not read twice, is known by place, size and date.

    Raises:
        RequestError: no source or two, unknown built-in, file missing or
            empty, no such column, data set unknown or out of reach, a revision of what is no hub data set.
        ChangedError: the fingerprint is not the one that `spec` expects.
    """
    num_rows = None
    _check_revision(spec)
    if spec.commit is None and spec.generated is None and _file_of(spec) is None:
        spec = replace(spec, commit=dataset_commit(spec))
    if spec.generated is not None:
        fingerprint = digest([spec.generated.sha256, *_format(spec)])
    elif spec.streaming:
        next(_checked(_stream(spec), spec, RowTally(spec)))
        file, first = _file_of(spec), b""
        if file is None:
            source = dataset_fingerprint(spec)
        else:
            path = local_path(file)
            source = file_sha256(path) if path is not None else place_and_date(file)
            first = first_line(file) if suffix_of(file) == ".txt" else b""
        fingerprint = digest(["streamed", _fingerprint(spec, source, first)])
    else:
        rows, fingerprint = _read(spec)
        num_rows = sum(1 for _ in _checked(rows, spec, RowTally(spec)))
    _check_unchanged(spec, fingerprint)
    return TextInfo(replace(spec, fingerprint=fingerprint, template=_template(spec)), fingerprint, num_rows)


def load_texts(spec: TextSpec) -> list[str]:
    """Return the rows of a text, in order. Raises RequestError and ChangedError as `describe_text` does."""
    return [record[spec.text_column] for record in open_records(spec)]


def open_records(spec: TextSpec, seed: int = 0, tally: RowTally | None = None) -> Iterator[Record]:
    """Yield the records of a text, one after another; each has the columns that `spec` names.

    Rows that cannot be used are left out, and `tally` counts them.

    With `spec.streaming` they are read as they are taken. Then a hub data set's
    shards come in an order drawn from `seed`; a file is read from its beginning.
    A stream is compared with what `spec` expects before its first record and after
    its last; a caller that takes fewer compares with `describe_text`.

    Raises:
        RequestError, ChangedError: as `describe_text`.
    """
    tally = tally or RowTally(spec)
    if not spec.streaming:
        rows, fingerprint = _read(spec)
        _check_unchanged(spec, fingerprint)
        yield from _checked(rows, spec, tally)
        return
    if spec.fingerprint is not None:
        describe_text(spec)
    yield from _checked(_stream(spec, seed), spec, tally)
    if spec.fingerprint is not None:
        describe_text(spec)


def split_documents(rows: Iterable[str]) -> Iterator[str]:
    """Yield the documents that rows make up (see the module), none of them blank."""
    lines: list[str] = []
    length = 0
    for row in rows:
        is_line = row.endswith("\n") or not row
        if lines and (not is_line or length > LONGEST_DOCUMENT or HEADING.fullmatch(row)):
            yield from _document_of(lines)
            lines, length = [], 0
        if not is_line:
            yield from _document_of([row])
            continue
        lines.append(row)
        length += len(row)
    yield from _document_of(lines)


def _document_of(lines: list[str]) -> Iterator[str]:
    text = "".join(lines)
    if text.strip():
        yield text


def chat_template_text(spec: TextSpec) -> str | None:
    """Return the template that `spec.chat_template` names: a file's content, `plain`, or None.

    Raises:
        RequestError: the file cannot be read.
    """
    return spec.chat_template if spec.chat_template in (None, PLAIN) else _template(spec)


def _template(spec: TextSpec) -> str | None:
    if spec.chat_template in (None, PLAIN):
        return None
    return spec.template if spec.template is not None else read_text(spec.chat_template)


def _format(spec: TextSpec) -> list[str | None]:
    """Return the settings by which the source is read: part of a text's fingerprint."""
    if not spec.conversations:
        return [spec.text_column]
    columns = [spec.prompt_column, spec.input_column, spec.response_column, spec.messages_column]
    return [*columns, chat_template_text(spec)]


def _fingerprint(spec: TextSpec, source: str, first: bytes = b"") -> str:
    """Return the text's fingerprint, from that of its source and, of a file, the first line."""
    file = _file_of(spec)
    if file is None:
        return digest([source, spec.split, *_format(spec)])
    if suffix_of(file) == ".txt":
        # Such rows were others in earlier releases, whose results are not to be found for them.
        return digest([source, "normalized"]) if is_normalized(first) else source
    return digest([source, *_format(spec)])


def _read(spec: TextSpec) -> tuple[Iterator[Row], str]:
    """Return all records, and the fingerprint of the bytes that they come from."""
    names = _all_columns(spec)
    if spec.generated is not None:
        directory = fetch(spec.generated)
        parts = [stream_rows(str(directory / file.name)) for file in spec.generated.files]
        return chain.from_iterable(parts), digest([spec.generated.sha256, *_format(spec)])
    file = _file_of(spec)
    if file is None:
        dataset, source = open_dataset(spec)
        _check_columns(dataset.column_names, names, spec)
        return _dataset_rows(dataset.select_columns(names), spec), _fingerprint(spec, source)
    check_suffix(file)
    content = read_file(file)
    source = hashlib.sha256(content).hexdigest()
    there: dict[str, None] = {}
    lines: list[int | None] = []
    table: dict[str, list[Any]] = {name: [] for name in names}
    for line, record in parse_rows(content, file, names):
        if not record.keys() <= there.keys():
            there |= dict.fromkeys(record)
        lines.append(line)
        for name, values in table.items():
            values.append(record.get(name))
    if lines:
        _check_columns(there, names, spec)
    records = (dict(zip(names, row, strict=True)) for row in zip(*table.values(), strict=True))
    return zip(lines, records, strict=True), _fingerprint(spec, source, BytesIO(content).readline())


def _stream(spec: TextSpec, seed: int = 0) -> Iterator[Row]:
    file = _file_of(spec)
    if file is not None:
        return stream_rows(file, _all_columns(spec))
    dataset = stream_dataset(spec)
    shards = list(range(dataset.num_shards))
    # Only shards are shuffled here: documents of several rows must stay whole.
    random.Random(seed).shuffle(shards)
    return _dataset_rows(chain.from_iterable(dataset.shard(len(shards), i) for i in shards), spec)


def _dataset_rows(records: Iterable[Record], spec: TextSpec) -> Iterator[Row]:
    with dataset_errors(spec):
        yield from ((None, record) for record in records)


def _columns(spec: TextSpec) -> tuple[str, ...]:
    """Return the columns that a record must have."""
    if spec.generated is not None:
        return ("prompt", "response")
    if not spec.conversations:
        return (spec.text_column,)
    named = (spec.messages_column,) if spec.messages_column else (spec.prompt_column, spec.response_column)
    return tuple(name for name in named if name)


def _all_columns(spec: TextSpec) -> list[str]:
    """Return the columns that a record must have, and the one that it may have."""
    return list(dict.fromkeys([*_columns(spec), *([spec.input_column] if spec.input_column else [])]))


def _check_columns(there: Iterable[str], names: Iterable[str], spec: TextSpec, place: str = "") -> None:
    fields = ("text_column", "prompt_column", "input_column", "response_column", "messages_column")
    for name in names:
        if name not in there:
            field = next((field for field in fields if getattr(spec, field) == name), "generated")
            raise RequestError(
                f"{spec.name!r}{place} has no column {name!r} ({field}); its columns are: {', '.join(there)}"
            )


def _check_revision(spec: TextSpec) -> None:
    """Refuse a revision of anything but a hub data set."""
    local = (
        spec.builtin is not None or Path(spec.path or "").expanduser().exists() or "://" in (spec.path or "")
    )
    if spec.revision is not None and local:
        raise RequestError(
            f"the text {spec.name!r} is no data set of the hub and has no revision {spec.revision!r}: "
            "revisions are branches, tags and commits of the hub; leave it out"
        )


def _check_unchanged(spec: TextSpec, fingerprint: str) -> None:
    """Refuse a text that differs from the one that the run was planned with."""
    if spec.fingerprint not in (None, fingerprint):
        raise ChangedError(
            f"the text {spec.name!r} is not the one that the run was planned with: it was changed since, or "
            f"differs on {socket.gethostname()} (fingerprint {fingerprint[:12]}, planned with "
            f"{str(spec.fingerprint)[:12]}). Put the former one back and continue with --resume, or start "
            "a new run for this one"
        )


def _checked(rows: Iterable[Row], spec: TextSpec, tally: RowTally) -> Iterator[Record]:
    """Yield the records that have their columns, others being counted; at least one must not be blank."""
    columns, names, blank, index = _columns(spec), _all_columns(spec), True, -1
    for index, (line, record) in enumerate(rows):
        tally.at(index, line)
        try:
            _check_row(
                record, [n for n in names if n in columns or record.get(n) is not None], spec, tally.place
            )
        except RequestError as error:
            tally.skip(error)
            continue
        blank = blank and not any(str(record[name]).strip() for name in columns)
        yield record
    if index < 0:
        raise RequestError(f"{spec.name!r} holds no rows; give a file with text in it")
    tally.finish()
    if blank:
        raise RequestError(f"{spec.name!r}: column {columns[0]!r} holds no text in any row")


def _check_row(record: Record, names: Iterable[str], spec: TextSpec, place: str) -> None:
    for name in names:
        if problem := _problem(record.get(name), name, spec):
            _check_columns(record, _columns(spec), spec, f": {place}")
            raise RequestError(f"{spec.name!r}: {place} of column {name!r} {problem}")


def _problem(value: Any, name: str, spec: TextSpec) -> str | None:
    """Return why a value is no text that a tokenizer can read, or no list of messages where one is due."""
    if name == spec.messages_column or (spec.generated and name == "prompt"):
        messages = value if isinstance(value, list) else []
        texts: list[Any] = [
            m.get(key) if isinstance(m, dict) else None for m in messages for key in ("role", "content")
        ]
        if not texts or not all(isinstance(text, str) for text in texts):
            return "is no list of messages, each with role and content that are text"
    elif isinstance(value, str):
        texts = [value]
    else:
        return f"is not text but {type(value).__name__}"
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}, at position {error.start}"
            return f"holds half of a character, {half}, which no tokenizer can read; mend or drop the row"
    return None


def _file_of(spec: TextSpec) -> str | None:
    """Return the path or URI of the file that `spec` names, or None for a data set that `datasets` loads."""
    if (spec.builtin is None) == (spec.path is None):
        raise RequestError("a text needs exactly one of `builtin` and `path`")
    if spec.builtin is not None:
        if spec.builtin not in BUILTIN_TEXTS:
            raise unknown_name("built-in text", spec.builtin, BUILTIN_TEXTS)
        return str(builtin_file(f"{spec.builtin}.txt"))
    path = spec.path or ""
    if Path(path).expanduser().is_dir():
        return None
    if suffix_of(path) in READERS or "://" in path or Path(path).expanduser().exists():
        return path
    if path.startswith((".", "/", "~")):
        raise RequestError(f"there is no file or directory {path!r}; give the path of a text")
    return None
