"""The campaign file is read strictly, overridden field by field, and without heavy imports."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.contracts import BelowCut
from orchestrator.config import CampaignConfig, load_config, parse_config
from orchestrator.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = [file for file in sorted(CONFIGS.rglob("*.yaml")) if "methods:" in file.read_text()]

MINIMAL: dict[str, Any] = {
    "name": "c",
    "models": [{"id": "m", "path": "org/model"}],
    "methods": [{"name": "iterabre"}],
    "targets": [{"fraction": 0.25}],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "campaign.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def _with(section: str, value: Any) -> dict[str, Any]:
    return {**MINIMAL, section: value}


def test_defaults_are_the_papers(file: Path) -> None:
    config = load_config(file)
    recovery = config.methods[0].recovery
    assert (recovery.objective, recovery.adapter.kind, recovery.adapter.rank) == ("kd", "lora", 32)
    assert (recovery.batch_size, recovery.learning_rate, recovery.sequence_length) == (32, 1e-4, 512)
    assert recovery.max_tokens == 2_500_000
    assert recovery.data.path == "Salesforce/wikitext"
    scoring = config.methods[0].scoring
    assert (scoring.criterion, scoring.reference, scoring.pooling) == ("hidden_cosine", "source", "flatten")
    assert scoring.calibration.builtin == "iterabre-appendix-a"
    assert config.methods[0].schedule.layers_per_iteration == 1
    assert config.seeds == [0]
    assert config.evaluation.also_before_recovery
    assert config.models[0].trust_remote_code is False


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_shipped_files_load(shipped: Path) -> None:
    assert load_config(shipped).models


def test_the_demo_is_shipped() -> None:
    assert CONFIGS / "demo.yaml" in SHIPPED


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("seed", [0], r"seed: unknown key"),
        ("methods", [{"name": "x", "recovery": {"lr": 1e-4}}], r"methods\.0\.recovery\.lr: unknown key"),
        ("methods", [], r"methods: .*at least 1"),
        ("methods", [{"name": "x", "recovery": {"learning_rate": "1e-4"}}], r"number \(got '1e-4'\)"),
        ("methods", [{"name": "x", "recovery": {"learning_rate": float("inf")}}], r"finite"),
        ("methods", [{"name": "x", "recovery": {"batch_size": 4.0}}], r"batch_size: .*integer"),
        ("methods", [{"name": "x", "schedule": {"mode": "greedy"}}], r"'iterative' or 'direct'"),
        ("models", [{"id": "m"}], r"models\.0\.path: Field required"),
        ("models", [{"id": "m", "path": "p", "trust_remote_code": "yes"}], r"trust_remote_code: .*bool"),
        ("models", [{"id": "../../x", "path": "p"}], r"models\.0\.id: '\.\./\.\./x' is no name"),
        ("models", [{"id": "m", "path": "p"}] * 2, r"model id 'm' stands there twice"),
        ("methods", [{"name": "x"}] * 2, r"method name 'x' stands there twice"),
        ("seeds", [1, 1], r"seed '1' stands there twice"),
        ("seeds", [-1], r"seeds: a seed lies between 0 and 2147483647"),
        ("targets", [{"layers": 3, "fraction": 0.5}], r"exactly one of `layers`, `fraction`, `par"),
        ("targets", [{"fraction": 1.0}], r"fraction: .*less than 1"),
        (
            "methods",
            [{"name": "x", "scoring": {"calibration": {"builtin": "a", "path": "b"}}}],
            r"exactly one of `builtin` and `path`",
        ),
        ("methods", [{"name": "x", "scoring": {"confidence": 0.95}}], "confidence: unknown key"),
        (
            "evaluation",
            {"perplexity": [{"name": "w", "data": {"builtin": "b"}}] * 2},
            r"evaluation\.perplexity name 'w' stands there twice",
        ),
        ("execution", {"backend": "dask"}, r"'ray' or 'local'"),
    ],
)
def test_wrong_fields_are_named(section: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(_with(section, value), "campaign.yaml")


def test_every_wrong_field_has_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, "nane": "c", "seeds": []}, "campaign.yaml")
    first, *lines = str(caught.value).splitlines()
    assert first == "campaign.yaml is not a valid campaign file:"
    assert [line.split(":")[0].strip() for line in lines] == ["seeds", "nane"]


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("methods.0.recovery.learning_rate=1e-4", lambda c: c.methods[0].recovery.learning_rate == 1e-4),
        ("methods.0.recovery.learning_rate=+1.E2", lambda c: c.methods[0].recovery.learning_rate == 100),
        (
            "methods.0.recovery.adapter.layers.below_cut=3",
            lambda c: c.methods[0].recovery.adapter.layers == BelowCut(3),
        ),
        ("methods.0.recovery.max_tokens=40_960", lambda c: c.methods[0].recovery.max_tokens == 40960),
        ("seeds=[1, 2]", lambda c: c.seeds == [1, 2]),
        ("targets=[{layers: 3}]", lambda c: c.targets[0].layers == 3),
        ("targets.0.fraction=0.5", lambda c: c.targets[0].fraction == 0.5),
        ("evaluation.tasks=[a, b]", lambda c: c.evaluation.tasks == ("a", "b")),
        ("evaluation.also_before_recovery=false", lambda c: not c.evaluation.also_before_recovery),
        ("models.0.revision=v1=2", lambda c: c.models[0].revision == "v1=2"),
        ("models.0.revision=", lambda c: c.models[0].revision is None),
        ("storage.path=s3://b/x", lambda c: c.storage.path == "s3://b/x"),
    ],
)
def test_overrides_are_yaml(file: Path, override: str, read: Any) -> None:
    assert read(load_config(file, [override]))


def test_the_last_override_wins(file: Path) -> None:
    assert load_config(file, ["name=a", "name=b"]).name == "b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name", r"--set 'name': write it as path\.to\.field=value"),
        ("=3", "write it as"),
        ("nane=b", "nane: unknown key"),
        ("models.1.path=x", r"'1' is no position in a list of 1, from 0"),
        ("models.-1.path=x", r"'-1' is no position"),
        ("models.first.path=x", r"'first' is no position"),
        ("targets.0=x", r"targets\.0: "),
        ("name.a=b", r"'name' holds a value, not a section"),
        ("targets.0.fraction.a=b", r"'fraction' holds a value, not a section"),
        ("evaluation.tasks=[a", r"'\[a' is no YAML value"),
        ("methods.0.recovery.batch_size=many", r"methods\.0\.recovery\.batch_size: .*\(got 'many'\)"),
    ],
)
def test_wrong_overrides_are_reported(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file, [override])


def test_override_into_a_list_of_values(file: Path) -> None:
    with pytest.raises(ConfigError, match="'0' holds a value, not a section"):
        load_config(file, ["seeds=[0]", "seeds.0.x=1"])


def test_a_list_can_be_given_one_more_value(file: Path) -> None:
    assert list(load_config(file, ["seeds.0=1"]).seeds) == [1]
    assert list(load_config(file, ["seeds=[0]", "seeds.1=7"]).seeds) == [0, 7]
    with pytest.raises(ConfigError, match="'3' is no position in a list of 1"):
        load_config(file, ["seeds=[0]", "seeds.3=1"])


def test_a_key_that_stands_twice_is_reported(file: Path) -> None:
    file.write_text(file.read_text() + "name: other\n")
    with pytest.raises(ConfigError, match=r"the key 'name' stands there twice .*line 9"):
        load_config(file)


def test_configs_survive_json() -> None:
    config = parse_config(MINIMAL, "campaign.yaml")
    assert CampaignConfig.model_validate_json(config.model_dump_json()) == config
    assert parse_config(config.model_dump(mode="json"), "stored") == config


def test_config_and_contracts_import_nothing_heavy() -> None:
    code = (
        "import sys, time, orchestrator.config, orchestrator.cli.app, actors.contracts, actors.errors\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'pyarrow', 'datasets') if m in sys.modules])\n"
        "print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, seconds = done.stdout.splitlines()
    assert heavy == "[]"
    assert float(seconds) < 2
