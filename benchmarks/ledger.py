"""A ledger of a million rows: written part by part as stages do, read and queried as users do.

python -m benchmarks.ledger [--rows 1000000] [--rows-per-part 2000]
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from orchestrator.storage.ledger import Ledger, Row


def stage_rows(part: int, rows: int) -> list[Row]:
    """What a recovery of so many numbers leaves: losses by step."""
    common: dict[str, Any] = {
        "campaign": "benchmark",
        "trajectory": f"model--method{part % 10}--seed0",
        "model": "model",
        "method": f"method{part % 10}",
        "seed": 0,
        "iteration": part // 10,
        "stage": "recover",
        "key": f"{part:064x}",
    }
    return [Row(**common, metric="loss", value=1.0 / (step + part + 1), step=step) for step in range(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-part", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="iterabre-ledger-") as scratch:
        ledger = Ledger(scratch)
        parts = arguments.rows // arguments.rows_per_part
        made = [stage_rows(part, arguments.rows_per_part) for part in range(parts)]
        started = time.perf_counter()
        for part, rows in enumerate(made):
            ledger.append(f"part-{part:06d}", rows)
        write_s = time.perf_counter() - started
        size = sum(file.stat().st_size for file in Path(scratch).glob("*.parquet"))
        count = parts * arguments.rows_per_part
        print(f"write: {count:,} rows in {parts:,} parts, {write_s:.1f} s, {count / write_s:,.0f} rows/s")
        print(f"size:  {size / count:.1f} bytes a row, {size / 2**20:.1f} MiB")
        started = time.perf_counter()
        table = ledger.read()
        read_s = time.perf_counter() - started
        assert table.num_rows == count
        print(f"read:  {read_s:.2f} s, {count / read_s:,.0f} rows/s")
        started = time.perf_counter()
        means = table.filter(pc.equal(table["metric"], "loss")).group_by(["method", "iteration"])
        groups = means.aggregate([("value", "mean")])
        print(f"query: mean loss of {groups.num_rows} groups, {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
