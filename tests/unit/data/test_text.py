"""Texts: what a row is, fingerprints, and errors that name file, column and remedy."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from actors.contracts import TextSpec
from actors.data import (
    BUILTIN_TEXTS,
    builtin_file,
    chat_template_text,
    describe_text,
    load_texts,
    open_records,
    split_documents,
)
from actors.errors import ChangedError, RequestError

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


SUFFIXES = [".txt", ".jsonl", ".csv", ".parquet"]


def write_text(path: Path) -> str:
    if path.suffix != ".txt":
        return write_table(path)
    path.write_bytes("first\r\n\n a\u2028b\x0cc \nlast".encode())
    return str(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_streamed_file_gives_the_same_rows(tmp_path: Path, suffix: str, scheme: str) -> None:
    spec = TextSpec(path=scheme + write_text(tmp_path / f"rows{suffix}"))
    assert load_texts(replace(spec, streaming=True)) == load_texts(spec)
    whole, streamed = describe_text(spec), describe_text(replace(spec, streaming=True))
    assert streamed.fingerprint != whole.fingerprint
    assert streamed.num_rows is None


def test_streams_read_no_more_than_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 100_000 + "{bad}\n")
    records = open_records(TextSpec(path=str(tmp_path / "a.jsonl"), streaming=True))
    assert [next(records)["text"] for _ in range(99_000)] == ["good"] * 99_000
    with pytest.raises(RequestError, match=r"a\.jsonl.*not a valid \.jsonl"):
        list(records)


def test_a_streamed_fingerprint_follows_the_content(tmp_path: Path) -> None:
    def fingerprint(name: str, text: str) -> str:
        (tmp_path / name).write_text(json.dumps({"text": text}) + "\n")
        return describe_text(TextSpec(path=str(tmp_path / name), streaming=True)).fingerprint

    assert fingerprint("a.jsonl", "x") == fingerprint("b.jsonl", "x")
    assert fingerprint("a.jsonl", "zz") != fingerprint("b.jsonl", "x")


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that `datasets` loads as it does a data set of the hub: three shards of Parquet."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "set" / "data"
    directory.mkdir(parents=True)
    for shard in range(3):
        rows = [{"text": f"document {shard}-{i}"} for i in range(4)]
        pa.parquet.write_table(pa.Table.from_pylist(rows), directory / f"train-0000{shard}-of-00003.parquet")
    return directory.parent


def test_a_data_set_is_streamed_shard_by_shard_in_an_order_of_the_seed(shards: Path) -> None:
    spec = TextSpec(path=str(shards), streaming=True)
    whole = load_texts(replace(spec, streaming=False))
    orders = [[r["text"] for r in open_records(spec, seed)] for seed in (0, 0, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) > 1
    for order in orders:
        assert sorted(order) == sorted(whole)
        assert [order[i : i + 4] == sorted(order[i : i + 4]) for i in (0, 4, 8)] == [True] * 3
    before = describe_text(spec).fingerprint
    assert describe_text(spec).fingerprint == before
    assert describe_text(replace(spec, split="train[:50%]", streaming=False)).num_rows == 6
    pa.parquet.write_table(
        pa.Table.from_pylist([{"text": "new"}]), shards / "data" / "train-00001-of-00003.parquet"
    )
    assert describe_text(spec).fingerprint != before


def test_documents_are_rows_or_begin_at_headings() -> None:
    rows = ["before\n", " = One = \n", " text \n", "", " = = Part = = \n", " more \n", " = Two = \n", "end\n"]
    assert list(split_documents(rows)) == ["before\n", "".join(rows[1:6]), "".join(rows[6:])]
    assert list(split_documents(["a", " ", "b\nc", "line\n", "line\n", "d"])) == [
        "a",
        "b\nc",
        "line\nline\n",
        "d",
    ]
    assert len(list(split_documents(load_texts(TextSpec(builtin="wikitext-2-raw-validation"))))) == 60
    lines = ["x" * 1023 + "\n"] * 4096
    assert "".join(split_documents(lines)) == "".join(lines)
    assert max(map(len, split_documents(lines))) < 1.01 * 2**20


CONVERSATION_CASES = [
    (
        {"prompt_column": "q", "response_column": "b"},
        r"no column 'b' \(response_column\); its columns are: q, a",
    ),
    ({"prompt_column": "p"}, r"no column 'p' \(prompt_column\)"),
    ({"prompt_column": "q", "input_column": "i"}, r"no column 'i' \(input_column\)"),
    ({"messages_column": "m"}, r"no column 'm' \(messages_column\)"),
    ({"messages_column": "q"}, "row 0 of column 'q' is no list of messages"),
    ({"prompt_column": "q", "response_column": "a"}, "row 1 of column 'a' is not text but NoneType"),
]


@pytest.mark.parametrize(("columns", "message"), CONVERSATION_CASES)
def test_wrong_columns_of_conversations_are_reported(
    tmp_path: Path, columns: dict[str, str], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "x", "a": "y"}\n{"q": "x", "a": null}\n')
    with pytest.raises(RequestError, match=message):
        describe_text(TextSpec(path=str(tmp_path / "a.jsonl"), **columns))


def test_the_fingerprint_of_conversations_follows_columns_and_template(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "x", "a": "y", "b": "z"}\n')
    (tmp_path / "t.jinja").write_text("one")

    def fingerprint(**changes: str) -> str:
        spec = TextSpec(path=str(tmp_path / "a.jsonl"), prompt_column="q", response_column="a")
        return describe_text(replace(spec, **changes)).fingerprint

    own = str(tmp_path / "t.jinja")
    seen = [fingerprint(), fingerprint(response_column="b"), fingerprint(chat_template="plain")]
    seen.append(fingerprint(chat_template=own))
    (tmp_path / "t.jinja").write_text("two")
    seen.append(fingerprint(chat_template=own))
    assert len(set(seen)) == 5


def test_a_json_file_cannot_be_streamed(tmp_path: Path) -> None:
    path = write_table(tmp_path / "rows.json")
    with pytest.raises(RequestError, match=r"cannot be streamed.*\.jsonl"):
        describe_text(TextSpec(path=path, streaming=True))


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".json"])
@pytest.mark.parametrize("streaming", [False, True])
def test_another_file_in_the_place_of_the_described_one_is_refused(
    tmp_path: Path, suffix: str, streaming: bool
) -> None:
    if streaming and suffix == ".json":
        return
    file = tmp_path / f"rows{suffix}"
    spec = TextSpec(path=(write_text if suffix == ".txt" else write_table)(file), streaming=streaming)
    described = describe_text(spec).spec
    assert (described, hash(described)) == (spec, hash(spec))
    assert load_texts(described) == load_texts(spec)
    before = file.stat()
    changed = file.read_bytes().replace(b"drei", b"vier").replace(b"last", b"next")
    assert len(changed) == before.st_size
    file.write_bytes(changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    for use in (describe_text, load_texts):
        with pytest.raises(ChangedError) as refused:
            use(described)
        now = describe_text(spec).fingerprint
        for said in (str(file), now[:12], str(described.fingerprint)[:12], "Put the former one back"):
            assert said in str(refused.value)


def test_a_stream_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n' * 9)
    records = open_records(describe_text(TextSpec(path=str(file), streaming=True)).spec)
    assert next(records) == {"text": "one"}
    file.write_text('{"text": "two"}\n' * 9)
    with pytest.raises(ChangedError, match=r"a\.jsonl"):
        list(records)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_that_changed_is_refused(shards: Path, streaming: bool) -> None:
    described = describe_text(TextSpec(path=str(shards), streaming=streaming)).spec
    assert len(load_texts(described)) == 12
    pa.parquet.write_table(
        pa.Table.from_pylist([{"text": "new"}]), shards / "data" / "train-00001-of-00003.parquet"
    )
    with pytest.raises(ChangedError, match="set"):
        load_texts(described)


def test_a_template_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "x"}\n')
    (tmp_path / "t.jinja").write_text("one")
    template = str(tmp_path / "t.jinja")
    spec = TextSpec(path=str(tmp_path / "a.jsonl"), prompt_column="q", chat_template=template)
    described = describe_text(spec).spec
    (tmp_path / "t.jinja").write_text("two")
    assert (chat_template_text(described), chat_template_text(spec)) == ("one", "two")
    assert load_texts(replace(described, text_column="q")) == ["x"]
