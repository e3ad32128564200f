"""Files as programs write them: byte order marks, line ends, odd cells, damage; streamed and whole alike."""

import csv
import json
import random
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as papq
import pytest

from actors.contracts import TextSpec
from actors.data import describe_text, load_texts
from actors.data.files import first_line, read_text, stream_rows
from actors.errors import RequestError

MARK = b"\xef\xbb\xbf"


def read(file: Path) -> list[str]:
    """The rows, found to be the same whole and streamed."""
    whole = load_texts(TextSpec(path=str(file)))
    if file.suffix != ".json":
        assert load_texts(TextSpec(path=str(file), streaming=True)) == whole
    return whole


def refusals(file: Path) -> list[str]:
    """What is said of the file, read as a whole and streamed; nothing but a RequestError is raised."""
    said = []
    for streaming in (False, True) if file.suffix != ".json" else (False,):
        with pytest.raises(RequestError) as refused:
            load_texts(TextSpec(path=str(file), streaming=streaming))
        said.append(str(refused.value))
    return said


READABLE: dict[str, tuple[bytes, list[str]]] = {
    "mark.jsonl": (MARK + b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n', ["one", "two"]),
    "mark.json": (MARK + b'[{"text": "one"}]', ["one"]),
    "mark.txt": (MARK + b" = Title = \r\n one", [" = Title = \n", " one"]),
    "mark.csv": (MARK + b"text\r\none\r\n", ["one"]),
    "feed.txt": (b"a\x0cb\r\nc\rd\n", ["a\x0cb\n", "c\rd\n"]),
    "mac.txt": (b"a\rb\rc", ["a\n", "b\n", "c"]),
    "mac.jsonl": (b'{"text": "a"}\r{"text": "b"}\r', ["a", "b"]),
    "mac.csv": (b'n,text\r1,"a\rb"\r2,c\r', ["a\rb", "c"]),
    "separator.jsonl": ('{"text": "a\u2028b\u0085c"}\n'.encode(), ["a\u2028b\u0085c"]),
    "nan.jsonl": (b'{"text": "a", "n": NaN}\n', ["a"]),
    "digits.csv": (
        b"text,n\n007,1\n2020-01-01,2\ntrue,3\n,4\n1e5,5\nNA,6\n",
        ["007", "2020-01-01", "true", "", "1e5", "NA"],
    ),
    "blank lines.csv": (b'\n\ntext\n\na\n""\n', ["a", ""]),
    "index.csv": (b',text,\n0,"a ""b"", c",\n', ['a "b", c']),
    "mixed ends.csv": (b'text\r\n"x\r\ny"\n"z\nw"\r\n', ["x\r\ny", "z\nw"]),
}


@pytest.mark.parametrize("name", READABLE)
def test_what_programs_write_is_read(tmp_path: Path, name: str) -> None:
    content, expected = READABLE[name]
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == expected


REFUSED: dict[str, tuple[bytes, str]] = {
    "few.csv": (b"n,text\n1,x\n2\n", "line 3 has 1 cells, the header 2"),
    "many.csv": (b"n,text\n1,x\n2,y,z\n", "line 3 has 3 cells, the header 2"),
    "later.csv": (b'n,text\n1,"x\ny\nz"\n\n2\n', "line 6 has 1 cells"),
    "twice.csv": (b"text,text\na,b\n", "line 1: the header names 'text' twice"),
    "header.csv": (b"n,text\n", "holds no rows"),
    "semicolon.csv": (b"n;text\n1;a\n", "no column 'text' .* its columns are: n;text"),
    "open quote.csv": (b'n,text\n1,a\n2,"b\n3,c\n', "line 3: unexpected end of data"),
    "zero.csv": (b"text\na\0b\n", "line 2, byte 6 of the file: a zero byte"),
    "latin.csv": ("text\nna\u00efve\n".encode("latin-1"), "line 2, byte 7 of the file: 0xEF is not UTF-8"),
    "windows.csv": ("text\na\n".encode("utf-16"), "UTF-16; save the file as UTF-8"),
    "cut.jsonl": (b'{"text": "ok"}\n' * 6 + b'{"text": "cut\n', "line 7, column 10: "),
    "list.jsonl": (b'{"text": "a"}\n[1]\n', "line 2: every record must be a JSON object, not list"),
    "pretty.jsonl": (b'[\n{"text": "a"}\n]\n', r"line 1.*must end with \.json"),
    "keys.jsonl": (b'{"text": "a", "text": "b"}\n', "line 1: an object names 'text' twice"),
    "missing.jsonl": (b'{"text": NaN}\n', "line 1, row 0 of column 'text' is not text but float"),
    "half.jsonl": (
        b'\n{"text": "a"}\n{"text": "x \\ud800 y"}\n',
        r"line 3, row 1 of column 'text' holds half of a character, \\ud800, at position 2",
    ),
    "deep.jsonl": (
        b'{"text": "a", "d": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n",
        "line 1: .*nested too deeply",
    ),
    "huge.jsonl": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "line 1: .*5000 digits"),
    "windows.jsonl": ('{"text": "a"}\n'.encode("utf-16-le"), "line 1, byte 1 of the file: a zero byte"),
    "lines.json": (
        b'{"text": "a"}\n{"text": "b"}\n',
        r"line 2, column 1: Extra data; .*must end with \.jsonl",
    ),
    "columns.json": (b'{"text": ["a"], "n": [1]}', "an object with text, n, not a list of records"),
    "empty.json": (b"[]", "holds no rows"),
    "item.json": (b'[{"text": "a"}, 3]', "row 1: every record must be a JSON object, not int"),
    "deep.json": (b"[" * 10**5, "nested too deeply"),
    "windows.txt": ("a\r\nb\n".encode("utf-16"), "UTF-16; save the file as UTF-8"),
    "unmarked.txt": ("abc\n".encode("utf-16-le"), "line 1, byte 1 of the file: a zero byte"),
    "latin.txt": (b"ok\nna\xefve\n", "line 2, byte 5 of the file: 0xEF is not UTF-8"),
    "mark alone.txt": (MARK, "holds no rows"),
    "cut.parquet": (b"PAR1abcPAR1", r"not a valid \.parquet file"),
    "rows.jsonl.gz": (b"\x1f\x8b", "is compressed; unpack it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_reported_with_its_place(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    for said in refusals(tmp_path / name):
        assert str(tmp_path / name) in said
        assert "\n" not in said
        with pytest.raises(RequestError, match=message):
            raise RequestError(said)


def test_cells_larger_than_a_block_are_read(tmp_path: Path) -> None:
    """Blocks of Arrow's reader are 2^20 bytes: here a cell is larger, and a line end lies on a border."""
    long = "x" * (3 * 2**20)
    border = "y" * (2**20 - len('text\r\n"') - 1)
    rows = [long + "\r\nnext", "short"]
    with (tmp_path / "long.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([row] for row in rows)])
    (tmp_path / "border.csv").write_bytes(f'text\r\n"{border}\r\nz"\r\n'.encode())
    assert (tmp_path / "border.csv").read_bytes()[2**20 - 1 :][:2] == b"\r\n"
    assert read(tmp_path / "long.csv") == rows
    assert read(tmp_path / "border.csv") == [f"{border}\r\nz"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_random_tables_come_back_as_they_were_written(tmp_path: Path, end: str) -> None:
    draw = random.Random(end)
    pieces = ["a", '"', ",", "\n", "\r\n", "\r", ";", " ", "é", "\u2028", "\x0c", "\ufeff", "12", "'"]
    rows = [["".join(draw.choices(pieces, k=draw.randrange(9))) for _ in range(2)] for _ in range(300)]
    written = StringIO(newline="")
    csv.writer(written, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([["text", "n"], *rows])
    (tmp_path / "a.csv").write_bytes(written.getvalue().encode())
    assert read(tmp_path / "a.csv") == [text for text, _ in rows]
    (tmp_path / "a.jsonl").write_bytes("".join(json.dumps({"text": text}) + end for text, _ in rows).encode())
    assert read(tmp_path / "a.jsonl") == [text for text, _ in rows]


TABLES: dict[str, Callable[[], pa.Table]] = {
    "large": lambda: pa.table({"text": pa.array(["a", "b"], pa.large_string())}),
    "dictionary": lambda: pa.table({"text": pa.array(["a", "b"]).dictionary_encode()}),
    "view": lambda: pa.table({"text": pa.array(["a", "b"], pa.string_view())}),
}


@pytest.mark.parametrize("name", TABLES)
def test_strings_of_every_kind_are_text(tmp_path: Path, name: str) -> None:
    papq.write_table(TABLES[name](), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", "b"]


def no_utf8() -> pa.Table:
    """Two strings, of which the second is no UTF-8."""
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")
    return pa.table({"text": pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])})


ODD_TABLES: dict[str, tuple[Callable[[], pa.Table], str]] = {
    "no rows": (lambda: pa.table({"text": pa.array([], pa.string())}), "holds no rows"),
    "bytes": (lambda: pa.table({"text": [b"a"]}), "row 0 of column 'text' is not text but bytes"),
    "null": (lambda: pa.table({"text": ["a", None]}), "row 1 of column 'text' is not text but NoneType"),
    "twice": (lambda: pa.table([["a"], ["b"]], names=["text", "text"]), "has the column 'text' twice"),
    "another": (lambda: pa.table({"body": ["a"], "n": [1]}), "its columns are: body, n"),
    "no UTF-8": (no_utf8, "row 1: .*utf-8"),
}


@pytest.mark.parametrize("name", ODD_TABLES)
def test_odd_parquet_is_reported_with_its_row(tmp_path: Path, name: str) -> None:
    table, message = ODD_TABLES[name]
    papq.write_table(table(), tmp_path / "a.parquet")
    for said in refusals(tmp_path / "a.parquet"):
        with pytest.raises(RequestError, match=rf"a\.parquet.*{message}"):
            raise RequestError(said)


def test_damage_in_the_middle_of_parquet_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pa.table({"text": [f"row {i}" for i in range(2000)]})
    papq.write_table(table, file, row_group_size=500, compression="none")
    content = bytearray(file.read_bytes())
    middle = papq.ParquetFile(file).metadata.row_group(2).column(0).dictionary_page_offset
    content[middle : middle + 400] = b"\xff" * 400
    file.write_bytes(bytes(content))
    for said in refusals(file):
        assert "damaged at or after row" in said or "cannot read" in said


def test_parquet_reads_only_the_columns_it_is_asked_for(tmp_path: Path) -> None:
    papq.write_table(pa.table({"text": ["a"], "vector": [[0.5] * 1000]}), tmp_path / "a.parquet")
    assert list(stream_rows(str(tmp_path / "a.parquet"), ["text"])) == [(None, {"text": "a"})]
    assert set(next(stream_rows(str(tmp_path / "a.parquet"), ["body"]))[1]) == {"text", "vector"}


def test_a_mark_or_old_line_ends_are_part_of_what_a_text_is(tmp_path: Path) -> None:
    """Rows of such files were others once, so that results of then must not be found for them."""
    contents = {"plain": b"a\nb\r\n", "mark": MARK + b"a\nb\r\n", "mac": b"a\rb\r"}
    fingerprints = set()
    for name, content in contents.items():
        file = tmp_path / f"{name}.txt"
        file.write_bytes(content)
        for streaming in (False, True):
            fingerprints.add(describe_text(TextSpec(path=str(file), streaming=streaming)).fingerprint)
    assert len(fingerprints) == 6
    assert first_line(str(tmp_path / "plain.txt")) == b"a\n"


def test_a_template_that_is_no_text_is_reported(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(MARK + b"{{ x }}\r\n")
    assert read_text(str(tmp_path / "t.jinja")) == "{{ x }}\r\n"
    (tmp_path / "t.jinja").write_bytes(b"{{ x }}\n\xff")
    with pytest.raises(RequestError, match=r"t\.jinja.*line 2, byte 8"):
        read_text(str(tmp_path / "t.jinja"))


def test_a_path_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no file or directory"):
        load_texts(TextSpec(path=str(tmp_path / "nowhere")))


def test_an_input_that_is_no_text_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "x", "i": null, "a": "y"}\n{"q": "x", "i": ["z"], "a": "y"}\n')
    spec = TextSpec(path=str(tmp_path / "a.jsonl"), prompt_column="q", input_column="i", response_column="a")
    with pytest.raises(RequestError, match="line 2, row 1 of column 'i' is not text but list"):
        describe_text(spec)
