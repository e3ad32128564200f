"""Which trajectories of a search are given up: plain cases, and that a resumed run decides the same."""

import itertools
import math
import random
from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.config import SearchConfig
from orchestrator.scheduling.search import Measured, measured_of, why_given_up

START = datetime(2026, 1, 1, tzinfo=UTC)


def asha(**settings: object) -> SearchConfig:
    return SearchConfig.model_validate({"scheduler": "asha", "metric": "fox/token_perplexity", **settings})


def values(*found: tuple[str, int, float]) -> list[Measured]:
    """Measured one a second, in that order."""
    return [
        Measured(name, at, value, START + timedelta(seconds=i)) for i, (name, at, value) in enumerate(found)
    ]


def test_the_first_at_a_rung_goes_on_and_those_worse_than_the_best_part_end() -> None:
    measured = values(("a", 1, 10.0), ("b", 1, 12.0), ("c", 1, 11.0), ("d", 1, 9.0))
    ends = {name: why_given_up(asha(reduction_factor=2), measured, name, 1) for name in "abcd"}
    assert {name for name, reason in ends.items() if reason} == {"b"}
    # c is the median of a and b, exactly; it goes on.
    assert ends["b"] == (
        "fox/token_perplexity 12 after iteration 1 is not among the best 1/2 of the 1 trajectories that came "
        "there before"
    )


def test_greater_is_better_with_mode_max_and_no_number_is_worst() -> None:
    measured = values(("a", 1, 0.5), ("b", 1, 0.6), ("c", 1, 0.4), ("d", 1, math.nan))
    ends = {name for name in "abcd" if why_given_up(asha(mode="max", reduction_factor=2), measured, name, 1)}
    assert ends == {"c", "d"}


def test_between_rungs_nothing_is_decided() -> None:
    measured = values(*((name, at, value) for at in (1, 2, 3) for name, value in (("a", 1.0), ("b", 9.0))))
    search = asha(grace_iterations=2, reduction_factor=3)
    decided = {at: why_given_up(search, [m for m in measured if m.iteration <= at], "b", at) for at in (1, 3)}
    assert decided == {1: None, 3: None}
    assert why_given_up(search, [m for m in measured if m.iteration <= 2], "b", 2)


def test_a_rung_that_is_not_measured_is_that_of_the_next_measured_iteration() -> None:
    """As with `evaluation.at: targets`: iterations 4 and 8 alone have values."""
    measured = values(("a", 4, 1.0), ("b", 4, 2.0), ("a", 8, 1.0))
    assert why_given_up(asha(reduction_factor=2), measured, "b", 4)
    assert not why_given_up(asha(reduction_factor=2), measured, "a", 4)


def test_what_was_let_on_stays_so_whatever_came_after() -> None:
    measured = values(("a", 1, 10.0), ("b", 1, 5.0), ("a", 2, 10.0))
    assert why_given_up(asha(reduction_factor=2), measured, "a", 1) is None


@pytest.mark.parametrize("scheduler", ["asha", "median_stopping"])
def test_a_decision_is_the_same_when_the_run_is_resumed(scheduler: str) -> None:
    """Decided as the values come, and once more with all that came after."""
    search = asha(scheduler=scheduler, reduction_factor=2)
    draw = random.Random(0)
    order = [(f"t{i}", at) for at in range(1, 9) for i in range(12)]
    draw.shuffle(order)
    measured: list[Measured] = []
    ended: dict[str, int] = {}
    for name, _ in order:
        at = 1 + sum(each.trajectory == name for each in measured)
        if name in ended:
            continue
        measured.append(Measured(name, at, draw.random(), START + timedelta(seconds=len(measured))))
        if why_given_up(search, measured, name, at):
            ended[name] = at
    assert ended
    again = {}
    for name, at in itertools.product({name for name, _ in order}, range(1, 9)):
        if why_given_up(search, measured, name, at):
            again[name] = at
    assert again == ended


def test_median_stopping_compares_the_best_value_with_the_median_of_means() -> None:
    search = asha(scheduler="median_stopping")
    others = [("a", 1, 4.0), ("a", 2, 2.0), ("b", 1, 5.0), ("b", 2, 3.0), ("c", 1, 9.0)]
    measured = values(*others, ("d", 1, 4.5), ("d", 2, 4.2))
    # Means 3, 4 and 9: the median is 4.
    assert why_given_up(search, measured, "d", 2) == (
        "fox/token_perplexity 4.2 after iteration 2, and all before, are worse than 4, the median of 3 "
        "others' means"
    )
    assert not why_given_up(search, values(*others[:4], ("d", 1, 4.5)), "d", 1)  # of two others
    assert not why_given_up(asha(scheduler="median_stopping", grace_iterations=3), measured, "d", 2)


def test_only_recovered_models_are_compared() -> None:
    row = {"trajectory": "a", "iteration": 1, "value": 3.0, "when": START, "metric": "fox/token_perplexity"}
    rows = [
        {**row, "stage": "evaluate", "phase": "recovered"},
        {**row, "stage": "evaluate", "phase": "pruned", "value": 4.0},
        {**row, "stage": "evaluate", "phase": "recovered", "metric": "fox/loss_nats"},
        {**row, "stage": "score", "phase": None},
    ]
    assert measured_of(rows, "fox/token_perplexity") == [Measured("a", 1, 3.0, START)]
