"""The papers' experiments, planned and run to their end on tiny models of the same families."""

import json
from pathlib import Path

import pytest

from orchestrator.config import CampaignConfig, load_config
from orchestrator.storage.ledger import Ledger
from tests.support.tiny_papers import save_models, tiny_settings
from tests.unit.cli.command import Answer, iterabre

FILES = sorted((Path(__file__).parents[3] / "configs" / "papers").glob("*.yaml"))
OF_EACH_PAPER = ("iterabre-table3", "gromov-figures", "limits-ratios-qwen2.5-7b-it")
SHALLOW = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models as deep as the papers' own."""
    directory = tmp_path_factory.mktemp("models")
    save_models(directory)
    return directory


@pytest.fixture(scope="module")
def shallow_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shallow")
    save_models(directory, SHALLOW)
    return directory


def given(command: str, file: Path, settings: list[str], *options: str) -> Answer:
    answer = iterabre(command, file, *options, *(part for s in settings for part in ("--set", s)))
    assert answer.exit_code == 0, answer.err
    return answer


def run(file: Path, settings: list[str]) -> CampaignConfig:
    """Run the file to its end, and look at what it leaves: numbers of all that was asked for, and models."""
    given("campaign", file, settings)
    config = load_config(file, settings)
    run_directory = Path(config.storage.path) / config.name
    rows = Ledger(str(run_directory / "ledger")).read().to_pylist()
    measured = {row["metric"].partition("/")[0] for row in rows if row["stage"] == "evaluate"}
    evaluation = config.evaluation
    assert measured >= {*evaluation.suites, *evaluation.tasks, *evaluation.probes}
    recovered = {row["method"] for row in rows if row["stage"] == "recover"}
    assert recovered == {m.name for m in config.methods if m.recovery.objective != "none"}
    statuses = json.loads(iterabre("status", run_directory, "--json").out)["outcomes"]
    assert {status["state"] for status in statuses.values()} == {"done"}
    exported = [json.loads(path.read_text()) for path in run_directory.glob("models/*/*/iterabre.json")]
    # Every model at every target by every method; direct trajectories are one a target.
    assert len(exported) == len(config.models) * len(config.methods) * len(config.targets)
    return config


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_is_planned_at_its_papers_depths(file: Path, models: Path, tmp_path: Path) -> None:
    config = load_config(file)
    settings = tiny_settings(config, models, tmp_path)
    plan = json.loads(given("plan", file, settings, "--json").out)
    planned = {row["trajectory"].split("--")[0] for row in plan["trajectories"]}
    assert planned == {model.id for model in config.models}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", OF_EACH_PAPER)
def test_one_of_each_paper_runs(name: str, shallow_models: Path, tmp_path: Path) -> None:
    """Its first model, made shallower, to one target."""
    file = next(file for file in FILES if file.stem == name)
    config = load_config(file)
    first = config.model_dump(mode="json")["models"][0]
    only = [f"models={json.dumps([first])}", f"targets=[{{layers: {SHALLOW - 1}}}]"]
    run(file, [*only, *tiny_settings(load_config(file, only), shallow_models, tmp_path)])


@pytest.mark.long
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_runs_to_its_papers_depths(file: Path, models: Path, tmp_path: Path) -> None:
    run(file, tiny_settings(load_config(file), models, tmp_path))
