"""The recipes, loaded, planned and run to their end on a tiny model."""

import json
from pathlib import Path

import pytest

from orchestrator.config import load_config
from orchestrator.planning.planner import build_plan
from orchestrator.storage.ledger import Ledger
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from tests.support.tiny_papers import tiny_settings
from tests.unit.cli.command import iterabre

FILES = sorted((Path(__file__).parents[3] / "configs" / "recipes").glob("*.yaml"))
TASKS = ("arc_easy", "winogrande", "lambada_openai", "copa", "openbookqa")
MOST_TOKENS = 2_500_000
"""Over the whole way down; the paper's recipe takes as many in each iteration."""


def _settings(file: Path, depth: int, directory: Path) -> list[str]:
    """A recipe's model made tiny, on a few rows of text and tasks."""
    tiny_model("llama", num_hidden_layers=depth).save_pretrained(directory / "models" / "smollm2-135m")
    tiny_tokenizer().save_pretrained(directory / "models" / "smollm2-135m")
    return tiny_settings(load_config(file), directory / "models", directory)


def test_all_recipes_are_here() -> None:
    assert [file.stem for file in FILES] == ["best", "cheap", "paper"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_is_of_one_kind(file: Path, tmp_path: Path) -> None:
    """The same model, target and evaluation, so that only the method differs; within its budget of tokens."""
    config = load_config(file, _settings(file, 30, tmp_path))
    own, best = load_config(file), load_config(FILES[0])
    assert (own.models, own.targets, own.evaluation) == (best.models, best.targets, best.evaluation)
    assert own.evaluation.tasks == TASKS
    assert (own.name, [method.name for method in own.methods]) == (f"recipe-{file.stem}", [file.stem])
    (trajectory,) = build_plan(config).trajectories
    recoveries = sum(trajectory.recovers(iteration) for iteration in trajectory.iterations)
    tokens = recoveries * own.methods[0].recovery.max_tokens
    assert tokens == 7 * 2_500_000 if file.stem == "paper" else tokens <= MOST_TOKENS


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_runs(file: Path, tmp_path: Path) -> None:
    settings = [*_settings(file, 6, tmp_path), "targets=[{layers: 4}]"]
    answer = iterabre("campaign", file, *(part for s in settings for part in ("--set", s)))
    assert answer.exit_code == 0, answer.err
    config = load_config(file, settings)
    run = Path(config.storage.path) / config.name
    rows = Ledger(str(run / "ledger")).read().to_pylist()
    measured = {row["metric"].partition("/")[0] for row in rows if row["stage"] == "evaluate"}
    assert measured >= {"wikitext2", *TASKS}
    iterations = {row["iteration"] for row in rows if row["stage"] == "recover"}
    assert iterations == ({1, 2} if file.stem == "paper" else {2})
    (model,) = run.glob("models/*/4-layers/iterabre.json")
    assert json.loads(model.read_text())
