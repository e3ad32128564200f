"""The papers' tables hold the campaign's numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.reporting.data.accuracies import (
    ABOVE_CHANCE,
    KEPT,
    MEAN_ACCURACY,
    accuracy_tasks,
    with_mean_accuracy,
)
from orchestrator.reporting.data.comparisons import (
    NOT_PRUNED,
    Grid,
    comparison_grids,
    entries,
    language_grid,
    method_grid,
    ratio_grid,
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
    within_noise,
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


def _model(phase: str, layers: int, perplexity: float, method: str = "a", **tasks: float) -> Measured:
    numbers = {"text/token_perplexity": Number(perplexity, None, "k")}
    numbers |= {f"{task}/acc": Number(value, 0.01, "k") for task, value in tasks.items()}
    return Measured(f"{method}-0", "smol", method, 0, 10 - layers, phase, layers, 100 * layers, numbers)


DENSE_MODEL = _model("dense", 10, 20, arc_easy=0.65, boolq=0.7)
HALF = _model("recovered", 8, 40, arc_easy=0.45, boolq=0.6)
LESS = _model("recovered", 6, 80, arc_easy=0.25, boolq=0.5)


def test_what_is_kept_is_of_accuracies_alone() -> None:
    found = entries(with_mean_accuracy([DENSE_MODEL, HALF, LESS]))
    grid = retention_grid(found)
    assert grid is not None
    (half,) = _rows(grid, layers=8)
    assert half["arc_easy/acc"].value == pytest.approx(100 * 0.45 / 0.65)
    assert half[KEPT].value == pytest.approx(100 * (0.45 + 0.6) / (0.65 + 0.7))
    # Of 0.4 and 0.2 above chance, 0.2 and 0.1 are left; a blind guess has nothing.
    assert half[ABOVE_CHANCE].value == pytest.approx(50)
    assert _rows(grid, layers=6)[0][ABOVE_CHANCE].value == pytest.approx(0)
    assert "text/token_perplexity" not in half
    ratios = ratio_grid(found)
    assert ratios is not None
    assert ratios.lines[0]["20% removed"].value == pytest.approx(half[KEPT].value)


def test_a_mean_is_of_all_tasks_or_none() -> None:
    part = _model("recovered", 8, 40, arc_easy=0.45)
    dense, half, without = with_mean_accuracy([DENSE_MODEL, HALF, part])
    assert dense.numbers[MEAN_ACCURACY].value == pytest.approx(0.675)
    assert half.numbers[MEAN_ACCURACY].stderr == pytest.approx(0.01 / 2**0.5)
    assert MEAN_ACCURACY not in without.numbers
    probe = replace(DENSE_MODEL, numbers={**DENSE_MODEL.numbers, "arithmetic/top1": Number(0.1, 0.0, "k")})
    assert accuracy_tasks([probe]) == ["arc_easy/acc", "boolq/acc"]


def test_runs_with_different_tasks_are_compared_by_those_in_common() -> None:
    """Of the unpruned model, the other run measured one task more."""
    more = replace(
        _model("dense", 10, 20, arc_easy=0.65, boolq=0.7, lambada_openai=0.4), trajectory="another run"
    )
    found = entries(with_mean_accuracy([DENSE_MODEL, HALF, more]))
    dense = next(entry for entry in found if entry.phase == "dense")
    assert "lambada_openai/acc" in dense.numbers
    assert dense.averaged == ("arc_easy/acc", "boolq/acc")
    grid = retention_grid(found)
    assert grid is not None
    # The chance of a blind guess is that of the two tasks, too.
    assert _rows(grid, layers=8)[0][ABOVE_CHANCE].value == pytest.approx(50)


def test_of_equal_cells_all_are_bold_or_none() -> None:
    """0.59996 and 0.60001 look alike, and so do all accuracies of the second task."""
    names, values = ("a", "b", "c"), (0.60001, 0.59996, 0.5)
    models = [
        _model("recovered", 8, 40, name, arc_easy=v, boolq=0.5) for name, v in zip(names, values, strict=True)
    ]
    grid = method_grid(entries(with_mean_accuracy([DENSE_MODEL, *models])))
    assert grid is not None
    bold = {(grid.lines[row]["method"], column) for row, column in grid.best}
    assert {(name, "arc_easy/acc") for name in "ab"} <= bold
    assert not {(name, column) for name in names for column in ("boolq/acc", "text/token_perplexity")} & bold


def test_a_bar_is_the_share_of_the_unpruned_value() -> None:
    grid = method_grid(entries(with_mean_accuracy([DENSE_MODEL, HALF])))
    assert grid is not None
    shares = {column: share for (row, column), share in grid.bars.items() if grid.lines[row]["layers"] == 8}
    assert shares["layers"] == shares["parameters"] == pytest.approx(0.8)
    assert shares["arc_easy/acc"] == pytest.approx(0.45 / 0.65)
    assert shares["text/token_perplexity"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("one", "other", "noise"),
    [
        (Number(48_430.0, None, ""), Number(48_436.0, None, ""), True),  # one seed each, 0.01 % apart
        (Number(30.0, None, ""), Number(30.5, None, ""), True),
        (Number(30.0, None, ""), Number(31.0, None, ""), False),
        (Number(30.0, 0.01, ""), Number(30.5, 0.01, ""), False),
    ],
)
def test_numbers_of_one_seed_that_are_close_are_not_told_apart(
    one: Number, other: Number, noise: bool
) -> None:
    assert within_noise(one, other) == noise


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
    assert choices[0].size == "9 of 10 layers"
    assert choices[0].facts == (
        ("131 M", "parameters, 3% fewer"),
        ("1.25 ×", "the WikiText-2 perplexity, 29 → 36.25"),
        ("96 % kept", "of BLiMP sample, 0.78 → 0.75 ± 0.012"),
    )
    assert (choices[0].rivals, choices[0].even) == (("bad (37.25)",), ())


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
    assert headline_metrics([model]) == ["w/token_perplexity", "blimp/acc", "arc_easy/acc"]


def test_retention_of_what_is_better_when_lower_is_inverse() -> None:
    assert retention(0.6, 0.8, "x/acc") == pytest.approx(0.75)
    assert retention(40, 20, "x/token_perplexity") == pytest.approx(0.5)
