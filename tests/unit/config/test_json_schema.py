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


class _Yaml12(yaml.SafeLoader):
    """Reads plain scalars as YAML 1.2 does (its core schema), so 2_500_000 is a text and 1e-3 a number."""


_Yaml12.yaml_implicit_resolvers = {}
for tag, pattern in (
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("merge", r"<<"),
    ("null", r"~|null|Null|NULL|"),
    ("int", r"[-+]?[0-9]+"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
):
    _Yaml12.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"), None)


@pytest.mark.parametrize("loader", [_Yaml12, yaml.SafeLoader], ids=["YAML 1.2", "YAML 1.1"])
@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_shipped_files_are_valid_as_editors_read_them(
    validator: Draft202012Validator, shipped: Path, loader: Any
) -> None:
    assert _errors(validator, yaml.load(shipped.read_text(), Loader=loader)) == []


@pytest.mark.parametrize(
    ("rate", "tokens", "valid"),
    [
        ("1e-3", "2_500_000", True),
        ("2.5E-4", 100, True),
        ("fast", 100, False),
        (1e-3, "1e3", False),
        (1e-3, "2_500_000 tokens", False),
        ("0.001", 100, False),  # the project's reader takes no text for a number, either
    ],
)
def test_numbers_in_other_spellings(
    validator: Draft202012Validator, rate: Any, tokens: Any, valid: bool
) -> None:
    recovery = {"learning_rate": rate, "max_tokens": tokens}
    raw = {**MINIMAL, "methods": [{"name": "x", "recovery": recovery}]}
    assert (not _errors(validator, raw)) is valid


def test_editors_complete_the_known_names(validator: Draft202012Validator) -> None:
    """Each as the table has it that is used; any other name is a plug-in's, or lm-eval's."""
    from actors.contracts import names
    from actors.data import BUILTIN_TEXTS
    from actors.evaluation import PROBES, SUITES
    from actors.recovery import OBJECTIVES
    from actors.scoring import CRITERIA

    tables = (CRITERIA, OBJECTIVES, PROBES, SUITES, BUILTIN_TEXTS)
    listed = (names.CRITERIA, names.OBJECTIVES, names.PROBES, names.SUITES, names.TEXTS)
    assert [list(table) for table in tables] == [list(each) for each in listed]
    own = Path(__file__).parents[3] / "actors" / "evaluation" / "lm_eval" / "tasks"
    assert {file.stem for file in own.glob("*.yaml")} == set(names.TASKS)

    definitions = json.loads(json.dumps(validator.schema))["$defs"]
    shown = [
        definitions["ScoringSettings"]["properties"]["criterion"],
        definitions["RecoveryConfig"]["properties"]["objective"],
        *(
            definitions["EvaluationConfig"]["properties"][field]["items"]
            for field in ("probes", "suites", "tasks")
        ),
    ]
    found = [next(option["enum"] for option in each["anyOf"] if "enum" in option) for each in shown]
    expected = (names.CRITERIA, names.OBJECTIVES, names.PROBES, names.SUITES, names.TASKS)
    assert [tuple(each) for each in found] == [*expected]
    raw = {**MINIMAL, "evaluation": {"tasks": ["arc_easy"], "probes": ["a-plug-in's"]}}
    assert _errors(validator, raw) == []


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
