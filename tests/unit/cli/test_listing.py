"""`iterabre ls`, `--version` and `-h`."""

import json
from pathlib import Path

import pytest

from actors.errors import RequestError
from actors.scoring import find_criterion
from orchestrator.cli import listing
from orchestrator.cli.listing import KINDS
from tests.unit.cli.command import iterabre

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("kind", KINDS)
def test_every_list_has_names_and_says_where_they_are_from(kind: str) -> None:
    answer = iterabre("ls", kind, "--json")
    assert answer.exit_code == 0, answer.err
    rows = json.loads(answer.out)
    assert len(rows) > 2
    assert all(row["source"] for row in rows if kind not in ("tasks", "recipes"))
    assert rows[-1][next(iter(rows[-1]))] in iterabre("ls", kind).out


def test_what_is_listed_can_be_used() -> None:
    for row in json.loads(iterabre("ls", "criteria", "--json").out):
        assert find_criterion(row["criterion"]).source == row["source"]
    with pytest.raises(RequestError):
        find_criterion("criterion")


def test_recipes_are_files_of_a_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = json.loads(iterabre("ls", "recipes", "--json").out)
    assert {row["recipe"] for row in rows} >= {"best", "cheap", "paper"}
    assert all((CONFIGS.parent / row["file"]).is_file() for row in rows)
    monkeypatch.setattr(listing, "RECIPES", tmp_path / "none")
    assert "clone it" in iterabre("ls", "recipes").err


def test_a_list_can_be_searched() -> None:
    found = iterabre("ls", "tasks", "--search", "WinoGrande").out.split()
    assert "winogrande" in found
    assert all("winogrande" in name.lower() for name in found)


def test_an_unknown_list_names_those_that_there_are() -> None:
    answer = iterabre("ls", "criterions")
    assert answer.exit_code == 2
    assert "did you mean criteria" in answer.err


def test_versions_are_told() -> None:
    answer = iterabre("--version")
    assert answer.exit_code == 0
    assert answer.out.startswith("iterabre ")
    assert {line.split()[0] for line in answer.out.splitlines()} >= {"torch", "transformers", "ray"}


def test_h_is_help() -> None:
    assert iterabre("campaign", "-h").out == iterabre("campaign", "--help").out
