"""Campaigns in which layers are chosen by hand, and those that heal a model which is pruned already."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from actors.errors import RequestError
from actors.models import load_model, remove_layers, save_pretrained
from orchestrator.config import parse_config
from orchestrator.execution.dry_run import planned_stages
from orchestrator.planning.planner import build_plan
from orchestrator.storage.ledger import Ledger
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.unit.cli.command import iterabre

FIXED = {"criterion": "fixed", "layers": [2, 0]}
LOGITS = {"hidden": 0.0, "attention": 0.0, "logits": 1.0}


def _run(campaign: dict[str, Any], place: Path, *options: str) -> list[dict[str, Any]]:
    answer = iterabre("campaign", write_campaign(campaign, place / "campaign.yaml"), *options)
    assert answer.exit_code == 0, answer.err
    return Ledger(f"{place}/runs/tiny/ledger").read().to_pylist()


def test_targets_are_prefixes_of_the_list(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    campaign["methods"][0] |= {"scoring": FIXED, "recovery": {"objective": "none"}}
    rows = _run(campaign, tmp_path)
    dropped = {row["iteration"]: row["layer"] for row in rows if row["metric"] == "dropped"}
    assert dropped == {1: 2, 2: 0}
    found = [
        json.loads(file.read_text())["dropped_source_layers"] for file in tmp_path.rglob("iterabre.json")
    ]
    assert sorted(found) == [[0, 2], [2]]


def test_protected_layers_stay_and_have_scores(tmp_path: Path) -> None:
    campaign = tiny_campaign(tmp_path)
    method = campaign["methods"][0]
    method["scoring"] |= {"criterion": "reverse", "protected": {"first": 1, "last": 1}}
    method["recovery"] = {"objective": "none"}
    rows = _run(campaign, tmp_path)
    dropped = {row["iteration"]: row["layer"] for row in rows if row["metric"] == "dropped"}
    assert dropped == {1: 2, 2: 1}
    assert {row["layer"] for row in rows if row["metric"] == "score"} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        ({"criterion": "fixed"}, r"'fixed' needs scoring\.layers"),
        ({"layers": [1, 2]}, r"'hidden_cosine' chooses the layers itself"),
        ({"criterion": "fixed", "layers": [1]}, r"takes 2 of 4 away, and scoring\.layers lists 1"),
        ({"criterion": "fixed", "layers": [1, 4]}, r"scoring\.layers has 4; .* 0 to 3"),
        ({"criterion": "fixed", "layers": [1, 2, 1]}, r"scoring\.layers has 1 more than once"),
        ({**FIXED, "protected": [3]}, r"leave out scoring\.protected"),
        ({"protected": [0, 9]}, r"scoring\.protected has 9"),
        ({"protected": {"first": 2, "last": 1}}, r"takes 2 of 4 away, and scoring\.protected leaves 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    tmp_path: Path, scoring: dict[str, Any], message: str
) -> None:
    campaign = tiny_campaign(tmp_path)
    campaign["methods"][0]["scoring"] |= scoring
    with pytest.raises(RequestError, match=message):
        build_plan(parse_config(campaign, "campaign.yaml"))


def _healing(place: Path) -> dict[str, Any]:
    """A campaign on a checkpoint that is pruned already, with the model that it comes from as teacher."""
    campaign = tiny_campaign(place)
    model, tokenizer = load_model(str(place / "model"))
    save_pretrained(remove_layers(model, [1]), place / "pruned", tokenizer=tokenizer)
    campaign["models"] = [{"id": "pruned", "path": str(place / "pruned")}]
    recovery = campaign["methods"][0]["recovery"]
    recovery |= {"teacher": {"id": "original", "path": str(place / "model")}, "loss": LOGITS}
    campaign["targets"] = [{"layers": 3}]
    return campaign


@pytest.mark.parametrize("mode", ["iterative", "direct"])
def test_a_pruned_model_is_healed_as_it_is(tmp_path: Path, mode: str) -> None:
    campaign = _healing(tmp_path)
    campaign["methods"][0]["schedule"] = {"mode": mode}
    (trajectory,) = build_plan(parse_config(campaign, "campaign.yaml")).trajectories
    kinds = [stage.kind for stage in planned_stages(trajectory)]
    assert "score" not in kinds
    assert kinds.count("recover") == 1
    rows = _run(campaign, tmp_path)
    losses = [row["value"] for row in rows if row["metric"] == "loss_logits"]
    assert losses
    assert all(loss > 0 for loss in losses)
    exported = next((tmp_path / "runs/tiny").rglob("iterabre.json")).parent
    healed = AutoModelForCausalLM.from_pretrained(exported)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert healed.config.num_hidden_layers == 3
    pairs = zip(healed.parameters(), pruned.parameters(), strict=True)
    assert any(bool((mine != theirs).any()) for mine, theirs in pairs)
    assert _run(campaign, tmp_path, "--resume") == rows
    for command in (("plan", tmp_path / "campaign.yaml"), ("report", tmp_path / "runs/tiny")):
        answer = iterabre(*command)
        assert answer.exit_code == 0, answer.err


def test_healing_may_be_a_stop_on_the_way_down(tmp_path: Path) -> None:
    campaign = _healing(tmp_path)
    campaign["targets"] = [{"layers": 3}, {"layers": 2}]
    (trajectory,) = build_plan(parse_config(campaign, "campaign.yaml")).trajectories
    steps = [(i.index, i.layers_to_drop, i.layers_left, i.is_target) for i in trajectory.iterations]
    assert steps == [(1, 0, 3, True), (2, 1, 2, True)]


@pytest.mark.parametrize(
    ("recovery", "message"),
    [
        ({"teacher": None}, r"3 layers drops nothing.*recovery\.teacher"),
        ({"objective": "none", "teacher": None}, r"3 layers drops nothing, and recovery\.objective is none"),
        ({"start": "linear_bridge"}, "3 layers drops nothing, so that there is nothing to bridge"),
    ],
)
def test_a_model_that_would_learn_nothing_is_refused(
    tmp_path: Path, recovery: dict[str, Any], message: str
) -> None:
    campaign = _healing(tmp_path)
    campaign["methods"][0]["recovery"] |= recovery
    with pytest.raises(RequestError, match=message):
        build_plan(parse_config(campaign, "campaign.yaml"))
