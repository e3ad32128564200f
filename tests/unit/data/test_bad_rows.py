"""Rows that cannot be used are left out and counted, and refused where they are too many."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from actors.contracts import RowCounts, TextSpec
from actors.data import (
    RowTally,
    conversation_sequences,
    describe_text,
    load_texts,
    open_records,
    read_prompts,
)
from actors.errors import RequestError
from tests.unit.data.test_conversations import NO_SYSTEM, TURNS, chatty

HALF = "half a \ud800 character"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bad", [{"text": None}, {"text": HALF}, {"text": 3}, {"other": "x"}])
def test_a_bad_row_of_many_is_left_out_and_counted(
    tmp_path: Path, bad: dict[str, Any], streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": f"row {i}"} for i in range(199)]
    spec = TextSpec(path=write(tmp_path / "a.jsonl", [*rows[:7], bad, *rows[7:]]), streaming=streaming)
    tally = RowTally(spec)
    with caplog.at_level(logging.WARNING):
        assert [r["text"] for r in open_records(spec, tally=tally)] == [r["text"] for r in rows]
    assert tally.counts() == RowCounts(read=200, bad=1)
    assert "line 8, row 7" in caplog.text
    assert "1 of 200 rows of" in caplog.text
    if not streaming:
        assert describe_text(spec).num_rows == 199


@pytest.mark.parametrize("streaming", [False, True])
def test_too_many_bad_rows_are_refused_with_the_first_one(tmp_path: Path, streaming: bool) -> None:
    rows = [{"text": None if i % 50 == 3 else "x"} for i in range(200)]
    path = write(tmp_path / "a.jsonl", rows)
    message = r"line 4, row 3 of column 'text'.*4 of 200, more than max_bad_rows: 0\.01 allows"
    with pytest.raises(RequestError, match=message):
        load_texts(TextSpec(path=path, streaming=streaming))
    assert len(load_texts(TextSpec(path=path, streaming=streaming, max_bad_rows=0.02))) == 196
    with pytest.raises(RequestError, match=r"1 of 4, more than max_bad_rows: 0 allows"):
        load_texts(TextSpec(path=path, streaming=streaming, max_bad_rows=0))


def test_a_stream_with_the_wrong_column_is_refused_after_few_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"body": "x"}] * 5000)
    with pytest.raises(RequestError, match=r"no column 'text' \(text_column\).*11 of 11"):
        next(open_records(TextSpec(path=path, streaming=True)))


@pytest.mark.parametrize(
    "bad",
    [
        [],
        None,
        [{"role": "user", "content": None}],
        [{"role": "system", "content": "x"}, *TURNS],  # refused by the template
    ],
)
def test_conversations_that_cannot_be_written_are_left_out(tmp_path: Path, bad: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"m": TURNS}] * 100 + [{"m": bad}] + [{"m": TURNS[:1]}] * 5)
    spec = TextSpec(path=path, messages_column="m")
    tally = RowTally(spec)
    sequences = list(conversation_sequences(spec, chatty(NO_SYSTEM), 64, tally=tally))
    assert len(sequences) == 100
    assert tally.counts() == RowCounts(read=106, bad=1, unanswered=5)
    assert len({tuple(s.ids) for s in sequences}) == 1


def test_bad_prompts_are_left_out(tmp_path: Path) -> None:
    rows = [{"q": "one ?"}, {"q": None}, {"q": "two ?"}]
    spec = TextSpec(path=write(tmp_path / "a.jsonl", rows), prompt_column="q", max_bad_rows=0.5)
    assert [prompt[0]["content"] for prompt in read_prompts(spec)] == ["one ?", "two ?"]
