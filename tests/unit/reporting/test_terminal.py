"""The table that compares trajectories keeps within the terminal, and keeps what matters."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from rich.console import Console

from orchestrator.reporting.tables.tables import Line
from orchestrator.reporting.tables.terminal import comparison_lines, comparison_table
from tests.unit.reporting.sample_run import sample_ledger

PERPLEXITY, ACCURACY = "wikitext2/token_perplexity", "blimp_sample/acc"


def _shown(lines: list[Line], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(lines, width))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def lines(tmp_path: Path) -> list[Line]:
    """Two methods; the second one's perplexities are higher by 1."""
    return comparison_lines(sample_ledger(str(tmp_path), ("smol--good--seed0", "smol--bad--seed1")))


def test_one_line_a_trajectory_and_target_below_the_unpruned_model(lines: list[Line]) -> None:
    assert [(line["method"], line["layers"]) for line in lines] == [
        ("unpruned", 10),
        *((method, layers) for layers in (9, 8, 7) for method in ("bad", "good")),
    ]
    best = lines[-1]
    assert best[PERPLEXITY] == pytest.approx(29 * 1.25**3)
    assert best[ACCURACY] == pytest.approx(0.69)
    assert (best["dropped"], best["dropped score"]) == ((8,), pytest.approx((0.95,)))
    assert best["seconds"] == pytest.approx(2.5 + 0.01 + 100 + 2 * 40)


def test_a_trajectory_that_is_alone_needs_no_name(tmp_path: Path) -> None:
    lines = comparison_lines(sample_ledger(str(tmp_path)))
    assert [line["layers"] for line in lines] == [10, 9, 8, 7]
    assert not {"model", "method", "seed"} & lines[0].keys()
    assert comparison_lines(sample_ledger(str(tmp_path / "none"), ())) == []


def test_what_is_dropped_between_targets_is_joined(tmp_path: Path) -> None:
    ledger = sample_ledger(str(tmp_path), ("smol--a--seed0", "smol--b--seed0"))
    at_once = ledger.filter(~((pc.field("stage") == "export") & (pc.field("iteration") < 3)))
    last = comparison_lines(at_once)[-1]
    assert (last["dropped"], last["seconds"]) == ((4, 7, 8), pytest.approx(3 * (2.5 + 0.01 + 100 + 80)))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_wider_than_the_terminal_or_cut_off(lines: list[Line], width: int) -> None:
    shown = _shown(lines, width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown


def test_quality_stays_where_it_is_narrow_and_what_goes_is_named(lines: list[Line]) -> None:
    many = [
        {**line, "dropped": tuple(range(10, 30)), "dropped score": (0.91234, 0.8, 0.7), "seconds": 12345.0}
        for line in lines
    ]
    shown = _shown(many, 60)
    for text in ("56.64", "0.69", "57.64"):
        assert text in shown
    left_out = " ".join(shown.split()).split("not shown: ")[1]
    assert "dropped score" in left_out
    assert "seconds" in left_out
    assert "not shown" not in _shown(lines, 120)
    assert "0.7 to 0.9123" in _shown(many, 140)


def test_the_mean_accuracy_and_what_is_kept_come_before_the_tasks(tmp_path: Path) -> None:
    ledger = sample_ledger(str(tmp_path))
    rows = [
        {**row, "metric": "arc_easy/acc", "value": row["value"] / 2}
        for row in ledger.filter(pc.field("metric") == ACCURACY).to_pylist()
    ]
    both = pa.concat_tables([ledger, pa.Table.from_pylist(rows, schema=ledger.schema)])
    line = comparison_lines(both)[-1]
    assert list(line)[:4] == ["layers", PERPLEXITY, "tasks/mean", "kept, %"]
    assert line["tasks/mean"] == pytest.approx(0.75 * 0.69)
    assert line["kept, %"] == pytest.approx(100 * 0.69 / 0.78)
