"""What `iterabre schema` prints agrees with what the campaign file's reader takes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from orchestrator.config.loading import _Loader
from tests.unit.cli.command import iterabre
from tests.unit.config.test_config import CONFIGS, MINIMAL, SHIPPED

CAMPAIGNS = Path(__file__).parents[3] / "docs" / "campaigns.md"


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    described = json.loads(iterabre("schema").out)
    Draft202012Validator.check_schema(described)
    return Draft202012Validator(described)


def _read(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _errors(validator: Draft202012Validator, raw: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(raw)]


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_shipped_files_are_valid(validator: Draft202012Validator, shipped: Path) -> None:
    assert _errors(validator, _read(shipped.read_text())) == []


def test_the_documented_campaign_is_valid(validator: Draft202012Validator) -> None:
    example = re.search(r"^```yaml\n(.*?)^```$", CAMPAIGNS.read_text(), re.MULTILINE | re.DOTALL)
    assert example
    assert "loguniform" in example[1]
    assert _errors(validator, _read(example[1])) == []


@pytest.mark.parametrize(
    "recovery",
    [
        {"learning_rate": {"uniform": [1e-4, 1e-3]}},
        {"objective": {"choice": ["kd", "healing"]}},
        {"data": {"grid": [{"path": "a.txt"}, {"builtin": "wikitext-2-raw-test"}]}},
        {"adapter": {"rank": {"grid": [8, 32]}}},
    ],
)
def test_spaces_in_methods_are_valid(validator: Draft202012Validator, recovery: dict[str, Any]) -> None:
    raw = {**MINIMAL, "methods": [{"name": "x", "recovery": recovery}]}
    assert _errors(validator, raw) == []


@pytest.mark.parametrize(
    "section",
    [
        {"methods": [{"name": "x", "recovery": {"learning_rate": {"loguniform": [0, 1]}}}]},
        {"methods": [{"name": "x", "recovery": {"learning_rate": {"grid": ["fast"]}}}]},
        {"methods": [{"name": "x", "recovery": {"objective": {"uniform": [0, 1]}}}]},
        {"methods": [{"name": "x", "recovery": {"lr": 1e-4}}]},
        {"targets": [{"layers": {"grid": [1, 2]}}]},
    ],
)
def test_what_the_reader_refuses_is_marked(validator: Draft202012Validator, section: dict[str, Any]) -> None:
    assert _errors(validator, {**MINIMAL, **section})
