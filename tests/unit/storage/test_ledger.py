"""Each number is in the ledger once, and a reader at any moment sees whole parts."""

import math
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.errors import RequestError, WorkError
from orchestrator.storage.ledger import SCHEMA, Ledger, Row

WHEN = datetime(2024, 5, 1, 12, 30, 15, 123456, tzinfo=UTC)
ROWS_PER_PART = 500


def _row(**fields: Any) -> Row:
    base = {"campaign": "c", "trajectory": "t", "model": "m", "method": "iterabre", "seed": 0, "key": "k"}
    base |= {
        "iteration": 1,
        "stage": "recover",
        "metric": "loss",
        "value": 1.0,
        "when": WHEN,
        "where": "host",
    }
    return Row(**(base | fields))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(str(tmp_path / "ledger"))


def test_row_has_the_columns_of_the_schema() -> None:
    assert set(SCHEMA.names) == set(Row.__dataclass_fields__)


def test_rows_come_back_as_written(ledger: Ledger) -> None:
    ledger.append(
        "a", [_row(step=3, value=0.1 + 0.2), _row(layer=7, stderr=0.5, phase="pruned", unit="nats")]
    )
    first, second = ledger.read().to_pylist()
    assert first == _row(step=3, value=0.1 + 0.2).__dict__
    assert second == _row(layer=7, stderr=0.5, phase="pruned", unit="nats").__dict__


def test_numbers_that_are_not_finite_are_kept_apart_from_missing_ones(ledger: Ledger) -> None:
    ledger.append("a", [_row(value=math.nan), _row(value=math.inf, stderr=math.nan)])
    table = ledger.read()
    assert table["value"].null_count == 0
    assert math.isnan(table["value"][0].as_py())
    assert table["value"][1].as_py() == math.inf
    assert table["stderr"].null_count == 1


def test_appending_again_replaces(ledger: Ledger) -> None:
    ledger.append("a", [_row(step=1), _row(step=2)])
    ledger.append("a", [_row(step=1), _row(step=2)])
    ledger.append("b", [_row(step=3)])
    assert ledger.read()["step"].to_pylist() == [1, 2, 3]


def test_other_numbers_replace_a_part(ledger: Ledger) -> None:
    ledger.append("a", [_row(value=2.0)])
    assert ledger.has("a")
    ledger.append("a", [_row(value=3.0)])
    assert ledger.read()["value"].to_pylist() == [3.0]


def test_damaged_part_is_mended_by_appending_again(ledger: Ledger) -> None:
    ledger.append("a", [_row()])
    Path(ledger.uri, "a.parquet").write_bytes(b"")
    ledger.append("a", [_row()])
    assert ledger.read().num_rows == 1


def test_empty_ledger_and_empty_part(ledger: Ledger) -> None:
    assert ledger.read().schema == SCHEMA
    assert not ledger.has("a")
    ledger.append("a", [])
    assert ledger.has("a")
    assert ledger.read().num_rows == 0


def test_damaged_part_is_named_and_never_skipped(ledger: Ledger) -> None:
    ledger.append("a", [_row()])
    ledger.append("b", [_row()])
    Path(ledger.uri, "b.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(WorkError, match=r"b\.parquet"):
        ledger.read()


def test_part_names_cannot_lead_out(ledger: Ledger) -> None:
    with pytest.raises(RequestError):
        ledger.append("../a", [_row()])


def _read_with_pandas(directory: Path) -> pd.DataFrame:
    return pd.read_parquet(directory)


def _read_with_glob(directory: Path) -> pd.DataFrame:
    """As `duckdb` and `polars` do with `ledger/*.parquet`."""
    return pa.concat_tables([pq.read_table(part) for part in directory.glob("*.parquet")]).to_pandas()


def _part(number: int, value: float = 1.0) -> list[Row]:
    return [_row(step=step, iteration=number, value=value) for step in range(ROWS_PER_PART)]


@pytest.mark.parametrize("read", [_read_with_pandas, _read_with_glob])
def test_reader_never_sees_half_a_part(ledger: Ledger, read: Callable[[Path], pd.DataFrame]) -> None:
    ledger.append("part-0", _part(0))

    def write() -> None:
        for number in range(1, 40):
            ledger.append(f"part-{number}", _part(number))
            ledger.append(f"part-{number - 1}", _part(number - 1, value=2.0))

    writer = threading.Thread(target=write)
    writer.start()
    row_counts = []
    while writer.is_alive():
        frame = read(Path(ledger.uri))
        assert set(frame.groupby("iteration").size()) == {ROWS_PER_PART}
        row_counts.append(len(frame))
    writer.join()
    assert row_counts == sorted(row_counts)
    assert len(read(Path(ledger.uri))) == 40 * ROWS_PER_PART


def test_reading_by_prefix_leaves_other_parts_closed(ledger: Ledger) -> None:
    ledger.append("a-000-evaluate", [_row(trajectory="a", value=1.0)])
    ledger.append("b-000-evaluate", [_row(trajectory="b", value=2.0)])
    Path(ledger.uri, "b-000-evaluate.parquet").write_bytes(b"damaged")
    assert ledger.read("a-")["value"].to_pylist() == [1.0]
    with pytest.raises(WorkError, match="b-000-evaluate"):
        ledger.read()
