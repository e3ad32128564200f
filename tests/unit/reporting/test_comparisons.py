"""The papers' tables hold the campaign's numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.reporting.data.comparisons import (
    NOT_PRUNED,
    Grid,
    comparison_grids,
    entries,
    language_grid,
    retention_grid,
    schedule_pairs,
)
from orchestrator.reporting.data.measured import (
    Measured,
    Number,
    direction,
    headline_metrics,
    measured_models,
    retention,
)
from orchestrator.reporting.tables.summary import best_at_each_size
from tests.unit.reporting.sample_run import sample_ledger

ITERATIVE = {"name": "iterative", "scoring": {"criterion": "x"}, "schedule": {"mode": "iterative"}}
DIRECT = {"name": "direct", "scoring": {"criterion": "x"}, "schedule": {"mode": "direct"}}


@pytest.fixture
def grids(tmp_path: Path) -> dict[str, Grid]:
    """Two methods; the second one's perplexities are higher by 1."""
    ledger = sample_ledger(str(tmp_path), ("smol--iterative--seed0", "smol--direct--seed0"))
    found = comparison_grids(ledger, measured_models(ledger), {"methods": [ITERATIVE, DIRECT]})
    return {grid.name: grid for grid in found}


def _rows(grid: Grid, **where: Any) -> list[dict[str, Any]]:
    return [line for line in grid.lines if all(line[name] == value for name, value in where.items())]


def test_methods_at_their_targets(grids: dict[str, Grid]) -> None:
    grid = grids["methods"]
    assert len(grid.lines) == 1 + 2 * 3
    (dense,) = _rows(grid, method=NOT_PRUNED)
    assert (dense["layers"], dense["wikitext2/token_perplexity"].value) == (10, 29)
    (line,) = _rows(grid, method="direct", layers=8)
    assert line["wikitext2/token_perplexity"].value == pytest.approx(29 * 1.25**2 + 1)
    best = {(grid.lines[row]["method"], column) for row, column in grid.best}
    assert best == {("iterative", "wikitext2/token_perplexity")}


def test_retention_is_the_share_of_the_unpruned_score(grids: dict[str, Grid]) -> None:
    (line,) = _rows(grids["retention"], method="iterative", layers=7)
    assert line["blimp_sample/acc"].value == pytest.approx(100 * 0.69 / 0.78)
    assert line["wikitext2/token_perplexity"].value == pytest.approx(100 / 1.25**3)
    average = (100 * 0.69 / 0.78 + 100 / 1.25**3) / 2
    assert line["average"].value == pytest.approx(average)
    (ratio,) = _rows(grids["ratios"], method="iterative")
    assert ratio["30% removed"].value == pytest.approx(average)


def test_what_reaches_the_best_value_0_has_no_share_and_leaves_the_average_a_number() -> None:
    names = ("degeneration/repetition", "arithmetic/accuracy")
    models = [
        Measured(
            "a-0", "smol", "a", 0, iteration, phase, layers, 1000,
            {name: Number(value, None, "key") for name, value in zip(names, values, strict=True)},
        )
        for iteration, phase, layers, values in (
            (0, "dense", 10, (0.2, 0.5)), (1, "recovered", 9, (0.0, 0.4)),
        )
    ]  # fmt: skip
    grid = retention_grid(entries(models))
    assert grid is not None
    (line,) = _rows(grid, method="a")
    assert line["average"].value == pytest.approx(80)
    assert line.get("degeneration/repetition") is None


def test_direct_and_iterative_are_paired(grids: dict[str, Grid]) -> None:
    (difference,) = _rows(grids["schedules"], method="difference", layers=7)
    assert difference["wikitext2/token_perplexity"].value == pytest.approx(1)  # iterative is lower: better
    assert difference["blimp_sample/acc"].value == pytest.approx(0)
    assert schedule_pairs([ITERATIVE, {**DIRECT, "scoring": {"criterion": "y"}}]) == []


def test_seeds_become_means_with_an_error(tmp_path: Path) -> None:
    ledger = sample_ledger(str(tmp_path), ("smol--a--seed0", "smol--a--seed1"))
    (entry,) = [e for e in entries(measured_models(ledger)) if (e.layers, e.phase) == (9, "recovered")]
    number = entry.numbers["wikitext2/token_perplexity"]
    assert (entry.seeds, number.value) == (2, pytest.approx(29 * 1.25 + 0.5))
    assert number.stderr == pytest.approx(0.5)  # of 0 and 1: deviation 0.707 over the root of 2


def test_languages_show_pruned_and_recovered() -> None:
    model = Measured("t", "smol", "a", 0, 1, "pruned", 8, 100, {"xnli/acc": Number(0.3, None, "k")})
    recovered = replace(model, phase="recovered", numbers={"xnli/acc": Number(0.4, None, "l")})
    grid = language_grid(entries([model, recovered]))
    assert grid is not None
    assert [(line["state"], line["xnli/acc"].value) for line in grid.lines] == [("P", 0.3), ("P+R", 0.4)]


def test_a_part_shows_the_columns_that_hold_anything() -> None:
    lines = ({"model": "a", "10%": 1.0, "33%": None}, {"model": "b", "10%": None, "33%": 0.0})
    grid = Grid("ratios", "", "", lines)
    assert [(model, grid.shown(part)) for model, part in grid.parts] == [("a", ["10%"]), ("b", ["33%"])]


def test_the_best_at_each_size_is_reported_with_its_rival(tmp_path: Path) -> None:
    ledger = sample_ledger(str(tmp_path), ("smol--good--seed0", "smol--bad--seed0"))
    choices = best_at_each_size(entries(measured_models(ledger)))
    assert [choice.method for choice in choices] == ["good"] * 3
    assert choices[0].size == "9 of 10 layers (131 M parameters, 3% fewer)"
    assert choices[0].numbers[0] == "wikitext2/token_perplexity 36.25 (unpruned 29, ×1.25)"
    assert choices[0].rival == "bad (37.25)"


@pytest.mark.parametrize(
    ("metric", "way"),
    [
        ("wikitext2/token_perplexity", "lower"),
        ("wikitext/word_perplexity", "lower"),
        ("c4/loss_over_log_vocab", "lower"),
        ("arc_easy/acc_norm", "higher"),
        ("gsm8k/exact_match,strict-match", "higher"),
        ("throughput/decode_tokens_per_second", "higher"),
        ("degeneration/mean_length", None),
    ],
)
def test_directions(metric: str, way: str | None) -> None:
    assert direction(metric) == way


def test_members_and_repetitions_are_no_headlines() -> None:
    names = ("blimp/acc", "blimp_wh_island/acc", "w/token_perplexity", "w/loss_nats", "arc_easy/acc")
    model = Measured("t", "m", "a", 0, 0, "dense", 1, 1, {name: Number(1.0, None, "k") for name in names})
    assert headline_metrics([model]) == ["w/token_perplexity", "arc_easy/acc", "blimp/acc"]


def test_retention_of_what_is_better_when_lower_is_inverse() -> None:
    assert retention(0.6, 0.8, "x/acc") == pytest.approx(0.75)
    assert retention(40, 20, "x/token_perplexity") == pytest.approx(0.5)
