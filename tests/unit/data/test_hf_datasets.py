"""Directories as data sets: saved ones are read; of others, what is wrong in them is reported."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from datasets import Dataset, DatasetDict

from actors.contracts import TextSpec
from actors.data import describe_text, load_texts
from actors.errors import RequestError

BOTH = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / "cache"))


def rows(*texts: str) -> Dataset:
    return Dataset.from_dict({"text": list(texts), "n": list(range(len(texts)))})


@BOTH
def test_a_saved_data_set_is_read(tmp_path: Path, streaming: bool) -> None:
    rows("a", "b", "c", "d").save_to_disk(tmp_path / "saved", num_shards=2)
    spec = TextSpec(path=str(tmp_path / "saved"), streaming=streaming)
    assert load_texts(spec) == ["a", "b", "c", "d"]
    before = describe_text(spec).fingerprint
    assert describe_text(spec).fingerprint == before
    half = TextSpec(path=str(tmp_path / "saved"), split="train[:50%]", streaming=streaming)
    assert load_texts(half) == ["a", "b"]
    assert describe_text(half).fingerprint != before
    rows("other").save_to_disk(tmp_path / "saved")
    assert describe_text(spec).fingerprint != before


@BOTH
@pytest.mark.parametrize("names", [("train", "test"), ("sft", "dpo"), ("train", "heldout")])
def test_the_splits_of_a_saved_dictionary_are_kept_apart(
    tmp_path: Path, names: tuple[str, str], streaming: bool
) -> None:
    DatasetDict({name: rows(f"of {name}") for name in names}).save_to_disk(tmp_path / "saved")
    for name in names:
        spec = TextSpec(path=str(tmp_path / "saved"), split=name, streaming=streaming)
        assert load_texts(spec) == [f"of {name}"]
        assert len(describe_text(spec).fingerprint) == 64
    with pytest.raises(RequestError, match=f"plit.*nope.*{names[0]}.*{names[1]}"):
        load_texts(TextSpec(path=str(tmp_path / "saved"), split="nope", streaming=streaming))


def script(directory: Path) -> None:
    (directory / f"{directory.name}.py").write_text("import datasets\n")
    (directory / "train.txt").write_text("a line\n")


def script_alone(directory: Path) -> None:
    (directory / "load.py").write_text("import datasets\n")


def columns(directory: Path) -> None:
    (directory / "a.jsonl").write_text('{"text": "a"}\n')
    (directory / "b.jsonl").write_text('{"text": "b", "year": 1}\n')


def damaged_lines(directory: Path) -> None:
    (directory / "a.jsonl").write_text('{"text": "a"}\n')
    (directory / "b.jsonl").write_text('{"text": "a"}\n{"text":\n')


def damaged_parquet(directory: Path) -> None:
    papq.write_table(pa.table({"text": ["a"]}), directory / "train-0.parquet")
    (directory / "train-1.parquet").write_bytes(b"PAR1 damaged PAR1")


def latin(directory: Path) -> None:
    (directory / "a.txt").write_bytes(b"na\xefve\n")


def other_split(directory: Path) -> None:
    (directory / "validation.jsonl").write_text('{"text": "a"}\n')


def empty(directory: Path) -> None:
    directory.mkdir(exist_ok=True)


def saved_without_its_data(directory: Path) -> None:
    rows("a").save_to_disk(directory)
    next(directory.glob("*.arrow")).unlink()


def saved_and_damaged(directory: Path) -> None:
    rows("a").save_to_disk(directory)
    next(directory.glob("*.arrow")).write_bytes(b"damaged")


DIRECTORIES: list[tuple[Callable[[Path], None], str]] = [
    (script, r"some\.py\) are not run"),
    (script_alone, r"load\.py\) are not run"),
    (columns, r"same columns.*a\.jsonl: text; b\.jsonl: text, year"),
    (damaged_lines, r"b\.jsonl' is not a valid \.jsonl file: line 2"),
    (damaged_parquet, r"train-1\.parquet' is not a valid \.parquet file"),
    (latin, r"a\.txt' is not a valid \.txt file: line 1, byte 2"),
    (other_split, r"plit.*train.*validation"),
    (empty, "doesn't contain any data files"),
    (saved_without_its_data, r"\.arrow"),
    (saved_and_damaged, "missing or damaged; write it again with save_to_disk"),
]


@BOTH
@pytest.mark.parametrize(("make", "message"), DIRECTORIES)
def test_what_is_wrong_in_a_directory_is_reported(
    tmp_path: Path,
    make: Callable[[Path], None],
    message: str,
    streaming: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "some").mkdir()
    make(tmp_path / "some")
    with pytest.raises(RequestError, match=rf"some.*{message}") as refused:
        load_texts(TextSpec(path=str(tmp_path / "some"), streaming=streaming))
    assert "does not exist" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "Failed to" not in capfd.readouterr().err
