"""Search spaces become concrete methods, the same ones every time."""

import math
import random
from typing import Any

import pytest

from orchestrator.config import CampaignConfig, parse_config
from orchestrator.config.search_space import variants
from orchestrator.errors import ConfigError

METHOD: dict[str, Any] = {
    "name": "m",
    "scoring": {"criterion": {"grid": ["hidden_cosine", "taylor"]}},
    "recovery": {"learning_rate": {"loguniform": [1e-5, 1e-3]}, "adapter": {"rank": {"choice": [4, 8, 16]}}},
}


def _campaign(method: dict[str, Any], **search: Any) -> CampaignConfig:
    raw = {
        "name": "c",
        "models": [{"id": "m", "path": "org/model"}],
        "methods": [{"name": "plain"}, method],
        "targets": [{"fraction": 0.25}],
        "search": search,
    }
    return parse_config(raw, "c.yaml")


def test_a_grid_is_every_combination_in_order() -> None:
    grid = {"name": "m", "a": {"grid": [1, 2]}, "b": {"c": {"grid": ["x", "y"]}}}
    assert variants(grid, samples=7, seed=0, where="methods.0") == [
        {"name": "m--a=1--c=x", "a": 1, "b": {"c": "x"}},
        {"name": "m--a=1--c=y", "a": 1, "b": {"c": "y"}},
        {"name": "m--a=2--c=x", "a": 2, "b": {"c": "x"}},
        {"name": "m--a=2--c=y", "a": 2, "b": {"c": "y"}},
    ]


def test_draws_are_those_of_a_plain_generator_and_the_same_for_every_point_of_the_grid() -> None:
    rate = random.Random("5/m/recovery.learning_rate")
    rank = random.Random("5/m/recovery.adapter.rank")
    bounds = math.log(1e-5), math.log(1e-3)
    expected = [(float(f"{math.exp(rate.uniform(*bounds)):.3g}"), rank.choice([4, 8, 16])) for _ in range(3)]
    made = variants(METHOD, samples=3, seed=5, where="methods.0")
    drawn = [(m["recovery"]["learning_rate"], m["recovery"]["adapter"]["rank"]) for m in made]
    assert drawn == expected * 2
    assert [m["scoring"]["criterion"] for m in made] == ["hidden_cosine"] * 3 + ["taylor"] * 3
    value, rank_ = expected[0]
    assert made[0]["name"] == f"m--criterion=hidden_cosine--learning_rate={value:g}--rank={rank_}"
    assert all(1e-5 <= value <= 1e-3 for value, _ in expected)


def test_one_space_does_not_move_another() -> None:
    alone = {"name": "m", "a": {"uniform": [0, 1]}}
    both = {"name": "m", "b": {"uniform": [0, 1]}, "a": {"uniform": [0, 1]}}
    values = [[m["a"] for m in variants(method, 4, 0, "methods.0")] for method in (alone, both)]
    assert values[0] == values[1]
    assert values[0] != [m["a"] for m in variants(alone, 4, 1, "methods.0")]


def test_equal_draws_are_one_method() -> None:
    assert len(variants({"name": "m", "a": {"choice": [1, 2]}}, 50, 0, "methods.0")) == 2


def test_names_of_fields_that_end_alike_are_written_out_and_lists_are_numbered() -> None:
    method = {"name": "m", "a": {"x": {"grid": [True]}}, "b": {"x": {"grid": [["q", "k"]]}}}
    (made,) = variants(method, 1, 0, "methods.0")
    assert made["name"] == "m--a.x=true--b.x=option0"


def test_a_campaign_holds_the_concrete_methods_and_reads_back_as_itself() -> None:
    config = _campaign(METHOD, samples=2, seed=1)
    assert len(config.methods) == 1 + 2 * 2
    assert config.methods[0].name == "plain"
    assert parse_config(config.model_dump(mode="json"), "stored") == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "learning_rate",
            {"grid": []},
            r"methods\.1\.recovery\.learning_rate: write the space as \{grid: ",
        ),
        ("learning_rate", {"grid": 1e-4}, r"write the space as \{grid: \[\.\.\., \.\.\.\]\} \(got 0\.0001\)"),
        ("learning_rate", {"loguniform": [0, 1]}, r"loguniform takes numbers above 0"),
        ("learning_rate", {"loguniform": [1e-3, 1e-4]}, r"takes two numbers, the lower first"),
        ("learning_rate", {"uniform": [1, 2, 3]}, r"takes two numbers"),
        ("learning_rate", {"uniform": ["a", "b"]}, r"takes two numbers"),
        ("learning_rate", {"grid": [1e-4, -1.0]}, r"methods\.1\.recovery\.learning_rate: .*greater than 0"),
        ("batch_size", {"uniform": [4, 64]}, r"methods\.1\.recovery\.batch_size: .*integer"),
        ("learning_rate", {"normal": [0, 1]}, r"methods\.1\.recovery\.learning_rate: .*number"),
    ],
)
def test_wrong_spaces_are_reported_with_their_place_in_the_file(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _campaign({"name": "m", "recovery": {field: value}})


def test_a_scheduler_compares_trajectories_of_one_model() -> None:
    config = _campaign(METHOD, scheduler="asha")
    raw = config.model_dump(mode="json")
    raw["models"].append({"id": "other", "path": "org/other"})
    with pytest.raises(ConfigError, match="'asha' compares trajectories of one model, and there are 2"):
        parse_config(raw, "c.yaml")
