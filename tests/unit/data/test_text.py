"""Texts: what a row is, fingerprints, and errors that name file, column and remedy."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from actors.contracts import TextSpec
from actors.data import BUILTIN_TEXTS, builtin_file, describe_text, load_texts
from actors.errors import RequestError

ROWS = ["one\n", "", 'two, with "quotes"\nand a second line', "drei – vier"]


def write_table(path: Path, column: str = "text") -> str:
    records = [{column: row, "n": i} for i, row in enumerate(ROWS)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".csv":
        pa.csv.write_csv(pa.Table.from_pylist(records), path)
    else:
        pa.parquet.write_table(pa.Table.from_pylist(records), path)
    return str(path)


@pytest.mark.parametrize("name", BUILTIN_TEXTS)
def test_builtin_rows_are_the_file(name: str) -> None:
    file = builtin_file(f"{name}.txt")
    assert "".join(load_texts(TextSpec(builtin=name))) == file.read_text(encoding="utf-8")
    info = describe_text(TextSpec(builtin=name))
    assert info.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()
    assert info.num_rows == file.read_bytes().count(b"\n")


def test_builtin_texts_are_the_published_ones() -> None:
    assert len(load_texts(TextSpec(builtin="wikitext-2-raw-validation"))) == 3760
    assert len(load_texts(TextSpec(builtin="wikitext-2-raw-test"))) == 4358
    sentences = load_texts(TextSpec(builtin="iterabre-appendix-a"))
    assert len(sentences) == 10
    assert sentences[0] == " = There ’s Got to Be a Way = \n"


def test_sources_name_the_hash_of_every_builtin_file() -> None:
    sources = builtin_file("SOURCES.md").read_text()
    files = [f for f in builtin_file("SOURCES.md").parent.iterdir() if f.suffix in (".txt", ".jsonl")]
    assert len(files) == 4
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() in sources


def test_blimp_sample_has_three_pairs_of_each_paradigm() -> None:
    pairs = [json.loads(line) for line in builtin_file("blimp-sample.jsonl").read_text().splitlines()]
    paradigms = [pair["UID"] for pair in pairs]
    assert len(set(paradigms)) == 67
    assert {paradigms.count(p) for p in paradigms} == {3}
    assert all(pair["sentence_good"] != pair["sentence_bad"] for pair in pairs)


def test_txt_rows_are_lines_with_their_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("first\r\n\n a\u2028b\x0cc \nlast".encode())
    assert load_texts(TextSpec(path=str(path))) == ["first\n", "\n", " a\u2028b\x0cc \n", "last"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_tables_give_their_text_column(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"rows{suffix}", column="body")
    spec = TextSpec(path=path, text_column="body")
    assert load_texts(spec) == ROWS
    assert describe_text(spec).num_rows == len(ROWS)


def test_a_uri_is_read_through_its_file_system(tmp_path: Path) -> None:
    path = write_table(tmp_path / "rows.jsonl")
    assert load_texts(TextSpec(path=f"file://{path}")) == ROWS


def test_fingerprint_follows_content_and_column_but_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "other": "y"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "x", "other": "y"}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "z", "other": "y"}\n')

    def fingerprint(name: str, column: str = "text") -> str:
        return describe_text(TextSpec(path=str(tmp_path / name), text_column=column)).fingerprint

    assert fingerprint("a.jsonl") == fingerprint("b.jsonl")
    assert fingerprint("a.jsonl") != fingerprint("c.jsonl")
    assert fingerprint("a.jsonl") != fingerprint("a.jsonl", "other")


def test_wrong_requests_say_what_and_where(tmp_path: Path) -> None:
    table = write_table(tmp_path / "rows.parquet")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bad.jsonl").write_text("{not json}\n")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "null.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "text.docx").write_text("x")
    cases = [
        (TextSpec(), "exactly one"),
        (TextSpec(builtin="wikitext-2-raw-test", path="x"), "exactly one"),
        (TextSpec(builtin="wikitext-2-raw-tset"), "did you mean wikitext-2-raw-test"),
        (TextSpec(path="./nowhere.txt"), "nowhere.txt.*No such file"),
        (TextSpec(path="nowhere.jsonl"), "nowhere.jsonl.*No such file"),
        (TextSpec(path=str(tmp_path / "empty.txt")), "empty.txt.*empty"),
        (TextSpec(path=table, text_column="body"), "rows.parquet.*'body'.*text, n"),
        (TextSpec(path=table, text_column="n"), "row 0 of column 'n' is not text but int"),
        (TextSpec(path=str(tmp_path / "bad.jsonl")), "bad.jsonl.*not a valid .jsonl"),
        (TextSpec(path=str(tmp_path / "list.json")), "JSON object"),
        (TextSpec(path=str(tmp_path / "null.jsonl")), "row 1 of column 'text'"),
        (TextSpec(path=str(tmp_path / "blank.jsonl")), "no text in any row"),
        (TextSpec(path=str(tmp_path / "text.docx")), "text.docx.*must end with"),
    ]
    for spec, message in cases:
        with pytest.raises(RequestError, match=message):
            describe_text(spec)
        with pytest.raises(RequestError, match=message):
            load_texts(spec)


def test_a_hub_data_set_out_of_reach_is_a_wrong_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match=r"no-such-owner/no-such-data.*split 'train'.*local file"):
        describe_text(TextSpec(path="no-such-owner/no-such-data"))
