"""The results table keeps within the terminal and says what it leaves out."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.reporting.tables.tables import iteration_table
from orchestrator.reporting.tables.terminal import results_table
from tests.unit.reporting.sample_run import sample_ledger


def _shown(lines: list[dict], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(results_table(lines, width))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def lines(tmp_path: Path) -> list[dict]:
    return iteration_table(sample_ledger(str(tmp_path)))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_wider_than_the_terminal_or_cut_off(lines: list[dict], width: int) -> None:
    shown = _shown(lines, width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown


def test_metrics_that_do_not_fit_are_named(lines: list[dict]) -> None:
    many = [line | {f"task_{i:02d}/acc": i / 20 for i in range(20)} for line in lines]
    shown = " ".join(_shown(many, 80).split())
    assert "not shown: " in shown
    named = shown.split("not shown: ")[1].split(";")[0].split(", ")
    assert "task_19/acc" in named
    assert "wikitext2/token_perplexity" not in named
    assert "not shown" not in _shown(lines, 120)


def test_a_score_that_recovery_may_still_change_is_not_shown(lines: list[dict]) -> None:
    accuracy, pruned = "blimp_sample/acc", "blimp_sample/acc before recovery"
    under_way = lines[1] | {"phase": "pruned", accuracy: None, pruned: 0.6123}
    shown = _shown([lines[0], under_way], 120)
    assert "0.6123" not in shown
    assert "0.78" in shown
    assert "–" in shown.splitlines()[-1]


def test_numbers_have_sensible_digits(lines: list[dict]) -> None:
    line = lines[1] | {"parameters": 134_515_008, "dropped": (4, 7, 9), "dropped score": (0.91234, 0.8, 0.7)}
    shown = _shown([line], 120)
    assert "134.5M" in shown
    assert "4, 7, 9" in shown
    assert "0.7 to 0.9123" in shown
