"""Random damages of data files: refused with the file's name, or read as a plain reader reads them."""

import csv
import json
import random
import re
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as papq
import pytest

from actors.contracts import TextSpec
from actors.data import load_texts
from actors.errors import RequestError

ROWS = [f'row {i}, "quoted" – ä\nnext line {i}' for i in range(20)]
JUNK = [
    b"\xff",
    b"\0",
    b'"',
    b"\r\n",
    b"\n",
    b"\r",
    b",",
    b"{",
    b"]",
    b"\xef\xbb\xbf",
    b"\\ud800",
    b"NaN",
    b"\xe4",
    b"9" * 5000,
]


def write_parquet(rows: list[str]) -> bytes:
    file = BytesIO()
    papq.write_table(pa.table({"text": rows}), file, compression="none")
    return file.getvalue()


def write_csv(rows: list[str]) -> bytes:
    file = StringIO(newline="")
    csv.writer(file).writerows([["n", "text"], *enumerate(rows)])
    return file.getvalue().encode()


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    ".txt": lambda rows: "".join(row + "\n" for row in rows).encode(),
    ".jsonl": lambda rows: "".join(
        json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows
    ).encode(),
    ".json": lambda rows: json.dumps([{"text": row} for row in rows]).encode(),
    ".csv": write_csv,
    ".parquet": write_parquet,
}
READERS: dict[str, Callable[[str], list[str]]] = {
    ".txt": lambda text: re.findall(
        r"[^\n]*\n|[^\n]+", text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")
    ),
    ".jsonl": lambda text: [
        json.loads(line)["text"] for line in re.split(r"\n" if "\n" in text else r"\r", text) if line.strip()
    ],
    ".json": lambda text: [record["text"] for record in json.loads(text)],
    ".csv": lambda text: [row["text"] for row in csv.DictReader(StringIO(text.lstrip("\r\n"), newline=""))],
}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content cut, with a piece left out, swapped or put in, or in another encoding."""
    at, length = draw.randrange(len(content)), draw.randrange(1, 40)
    kind = draw.randrange(6)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[at + length :]
    if kind == 2:
        return content[:at] + draw.choice(JUNK) + content[at:]
    if kind == 3:
        return content[:at] + bytes(draw.randrange(256) for _ in range(length)) + content[at + length :]
    if kind == 4:
        return content[at : at + length] + content[:at] + content[at + length :]
    encoding = draw.choice(["utf-16", "utf-16-le", "utf-8-sig", "latin-1"])
    return content.decode("utf-8", "replace").encode(encoding, "replace")


@pytest.mark.parametrize("suffix", WRITERS)
def test_damage_is_refused_or_read_as_it_stands(tmp_path: Path, suffix: str) -> None:
    draw, whole, refused = random.Random(suffix), WRITERS[suffix](ROWS), 0
    for number in range(60):
        file = tmp_path / f"{number}{suffix}"
        file.write_bytes(damaged(whole, draw))
        answers: list[list[str] | None] = []
        reported: list[bool] = []
        for streaming in (False, True) if suffix != ".json" else (False,):
            try:
                answers.append(load_texts(TextSpec(path=str(file), streaming=streaming)))
            except RequestError as error:
                answers.append(None)
                reported.append(str(error).count(str(file)) == 1 and "\n" not in str(error))
        assert all(reported)
        assert all(answer == answers[0] for answer in answers)
        refused += answers[0] is None
        if answers[0] is not None and suffix != ".parquet":
            assert answers[0] == READERS[suffix](file.read_bytes().decode("utf-8-sig")), file.read_bytes()
    assert 0 < refused < 60 or suffix == ".parquet"
