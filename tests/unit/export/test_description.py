"""Card and provenance beside an export: what made it stays, what was measured of it is kept up to date."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from actors.contracts import ArtifactRef, ExportResult, FileRef
from orchestrator.config import parse_config
from orchestrator.export.description import describe_export
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.planner import build_plan
from tests.support.tiny_campaign import tiny_campaign

WHEN = datetime(2026, 11, 29, tzinfo=UTC)
RESULT = ExportResult(ArtifactRef("x", (FileRef("model.safetensors", 1, "a"),)), 3, 10)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryPlan:
    config = parse_config(tiny_campaign(tmp_path_factory.mktemp("campaign")), "c.yaml")
    return build_plan(config).trajectories[0]


def _row(plan: TrajectoryPlan, metric: str, value: float) -> dict[str, Any]:
    where = {"trajectory": plan.id, "iteration": 1, "stage": "evaluate", "phase": "recovered", "when": WHEN}
    return {**where, "metric": metric, "value": value}


def _describe(
    plan: TrajectoryPlan, place: Path, dropped: int = 2, result: ExportResult = RESULT, **scores: float
) -> dict[str, Any]:
    rows = [_row(plan, f"fox/{name}", value) for name, value in scores.items()]
    model = plan.dense.without((dropped,))
    describe_export(str(place), plan, plan.iterations[0], model, rows, result)
    made: dict[str, Any] = json.loads((place / "iterabre.json").read_text())
    return made


def test_a_description_is_written_once(plan: TrajectoryPlan, tmp_path: Path) -> None:
    assert _describe(plan, tmp_path, ppl=5.0)["scores"] == {"fox/ppl": 5.0}
    (tmp_path / "README.md").write_text("as the user has it")
    assert _describe(plan, tmp_path, ppl=5.0)["scores"] == {"fox/ppl": 5.0}
    assert (tmp_path / "README.md").read_text() == "as the user has it"


def test_a_score_that_is_no_number_is_no_news(plan: TrajectoryPlan, tmp_path: Path) -> None:
    _describe(plan, tmp_path, ppl=float("nan"))
    (tmp_path / "README.md").write_text("as the user has it")
    _describe(plan, tmp_path, ppl=float("nan"))
    assert (tmp_path / "README.md").read_text() == "as the user has it"


def test_more_scores_leave_what_made_it(
    plan: TrajectoryPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _describe(plan, tmp_path, ppl=5.0)
    monkeypatch.setattr("orchestrator.export.provenance.installed_versions", lambda: {"torch": "99"})
    after = _describe(plan, tmp_path, ppl=5.0, acc=0.5)
    assert after == {**before, "scores": {"fox/ppl": 5.0, "fox/acc": 0.5}}
    assert "fox/acc" in (tmp_path / "README.md").read_text()


def test_another_model_in_its_place_leaves_nothing_of_the_former(
    plan: TrajectoryPlan, tmp_path: Path
) -> None:
    _describe(plan, tmp_path, ppl=5.0)
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "config.json"):
        (tmp_path / name).write_text("")
    made = _describe(plan, tmp_path, dropped=1, ppl=6.0)
    assert (made["dropped_source_layers"], made["scores"]) == ([1], {"fox/ppl": 6.0})
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md", "iterabre.json"}


def test_a_note_on_runtimes_is_in_the_card(plan: TrajectoryPlan, tmp_path: Path) -> None:
    noted = ExportResult(RESULT.artifact, 3, 10, note="llama.cpp computes other layers")
    _describe(plan, tmp_path, result=noted)
    assert "Note: llama.cpp computes other layers." in (tmp_path / "README.md").read_text()
