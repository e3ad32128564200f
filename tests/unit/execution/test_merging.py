"""A campaign that merges layers (`laco`) instead of dropping them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.contracts import Merge, ModelRef, ModelSpec, RecoverySpec, TextSpec
from actors.errors import RequestError
from actors.models import load_model
from actors.models.pruning.merging import merge_layers
from actors.recovery import check_recovery
from orchestrator.config import parse_config
from orchestrator.planning.planner import build_plan
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.unit.cli.command import iterabre


def _campaign(place: Path) -> dict[str, Any]:
    campaign = tiny_campaign(place)
    method = campaign["methods"][0]
    method["recovery"]["objective"] = "none"
    method["schedule"] = {"mode": "direct"}
    method["scoring"] |= {"criterion": "laco", "merge": {"threshold": -1.0, "group": 2, "interval": 2}}
    campaign["targets"] = [{"layers": 2}]
    return campaign


def test_the_exported_model_is_the_merged_one(tmp_path: Path) -> None:
    answer = iterabre("campaign", write_campaign(_campaign(tmp_path), tmp_path / "campaign.yaml"))
    assert answer.exit_code == 0, answer.err
    exported = next((tmp_path / "runs/tiny").rglob("iterabre.json"))
    merges = json.loads(exported.read_text())["merges"]
    assert [(merge["base"], merge["merged"]) for merge in merges] == [(2, [3]), (0, [1])]

    want, _ = load_model(str(tmp_path / "model"))
    merge_layers(merge_layers(want, 2, 1), 0, 1)
    got = AutoModelForCausalLM.from_pretrained(exported.parent)
    for value, wanted in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("schedule", {"mode": "iterative"}, r"'laco' merges all layers at once; set schedule\.mode: direct"),
        ("recovery", {"objective": "kd"}, r"'laco' changes weights that recovery trains on"),
        ("scoring", {"criterion": "hidden_cosine"}, r"'hidden_cosine' has no use for scoring\.merge"),
        ("scoring", {"merge": {"variant": "inplace"}}, r"unknown scoring\.merge\.variant 'inplace'; did you"),
    ],
)
def test_what_merging_does_not_go_with(
    tmp_path: Path, section: str, change: dict[str, Any], message: str
) -> None:
    campaign = _campaign(tmp_path)
    campaign["methods"][0][section] |= change
    with pytest.raises(RequestError, match=message):
        build_plan(parse_config(campaign, "campaign.yaml"))


def test_recovery_refuses_a_merged_model() -> None:
    model = ModelRef(ModelSpec("m"), (1,), merges=(Merge(0, (1,)),))
    with pytest.raises(RequestError, match=r"cannot heal merged layers; use recovery\.objective: none"):
        check_recovery(RecoverySpec(model=model, data=TextSpec()), workers=1)
