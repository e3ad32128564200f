"""Texts and tasks exchanged between plan and stage: refused, and nothing is stored under the old key."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.data import builtin_file
from orchestrator.config import parse_config
from orchestrator.execution.campaign import run_campaign
from orchestrator.planning.planner import build_plan
from orchestrator.storage.stage_store import Store
from tests.support.tiny_campaign import tiny_campaign

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "The"
doc_to_target: " dog"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def calibration(campaign: dict[str, Any], text: str) -> str:
    campaign["methods"][0]["scoring"]["calibration"]["path"] = text
    return "score"


def recovery(campaign: dict[str, Any], text: str) -> str:
    campaign["methods"][0]["recovery"]["data"]["path"] = text
    return "recover"


def streamed_recovery(campaign: dict[str, Any], text: str) -> str:
    campaign["methods"][0]["recovery"]["data"] = {"path": text, "streaming": True}
    return "recover"


def perplexity(campaign: dict[str, Any], text: str) -> str:
    campaign["evaluation"]["perplexity"][0]["data"]["path"] = text
    return "evaluate"


USES = [calibration, recovery, streamed_recovery, perplexity]


@pytest.mark.parametrize("use", USES)
def test_a_text_exchanged_after_planning_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[dict[str, Any], str], str]
) -> None:
    monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / "cache"))
    campaign = tiny_campaign(tmp_path)
    text = tmp_path / "other.txt"
    text.write_text((tmp_path / "text.txt").read_text())
    kind = use(campaign, str(text))
    config = parse_config(campaign, "campaign.yaml")
    plan, store = build_plan(config), Store.of_campaign(config.storage.path, config.name)
    former = text.read_text()
    text.write_text(former.replace("lazy dog", "calm cat"))
    outcome = run_campaign(config, plan, store, resume=False)
    (failure,) = outcome.failures.values()
    (trajectory,) = plan.trajectories
    planned = str(trajectory.texts[next(t for t in trajectory.texts if t.path == str(text))].fingerprint)
    assert str(text) in failure
    assert planned[:12] in failure
    assert not list((tmp_path / "runs/tiny/stages").glob(f"{kind}/*/manifest.json"))

    # With the former text back, the same run goes on.
    text.write_text(former)
    assert not run_campaign(config, build_plan(config), store, resume=True).failures


def test_tasks_exchanged_after_planning_are_refused(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "mine.yaml").write_text(TASK.format(name="mine", data=builtin_file("blimp-sample.jsonl")))
    campaign["evaluation"] |= {"tasks": ["mine"], "include_path": str(folder), "limit": 2}
    config = parse_config(campaign, "campaign.yaml")
    plan, store = build_plan(config), Store.of_campaign(config.storage.path, config.name)
    changed = yaml.safe_load((folder / "mine.yaml").read_text()) | {"doc_to_target": " fox"}
    (folder / "mine.yaml").write_text(yaml.safe_dump(changed))
    (failure,) = run_campaign(config, plan, store, resume=False).failures.values()
    assert str(folder) in failure
    assert str(plan.trajectories[0].evaluation.tasks_fingerprint)[:12] in failure


def test_what_a_plan_found_is_in_keys_by_its_content_alone(tmp_path: Path) -> None:
    config = parse_config(tiny_campaign(tmp_path), "campaign.yaml")
    (trajectory,) = build_plan(config).trajectories
    spec = trajectory.score_spec(trajectory.dense)
    assert spec.calibration.fingerprint == trajectory.fingerprints[spec.calibration]
    assert "fingerprint" not in str(trajectory.key_inputs(spec))
    assert "fingerprint" not in str(trajectory.key_inputs(trajectory.evaluation_spec(trajectory.dense)))
    assert spec == replace(spec, calibration=replace(spec.calibration, fingerprint=None))
