"""What no config can express is refused by the plan, or passed over."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from actors.contracts import ModelSpec
from actors.errors import RequestError
from actors.models import choose_removable, removable_layers, save_pretrained
from orchestrator.config import parse_config
from orchestrator.planning.planner import build_plan
from tests.support.decoder_zoo import tiny_decoder
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from tests.unit.cli.command import iterabre


def _saved(model: PreTrainedModel, directory: Path) -> str:
    save_pretrained(model, directory, tokenizer=tiny_tokenizer())
    return str(directory)


def _campaign(place: Path, model: PreTrainedModel | None = None, **scoring: Any) -> dict[str, Any]:
    """Without recovery, 4 → 3 → 2 layers of a Llama, or 6 → 4 of another model."""
    campaign = tiny_campaign(place)
    if model is not None:
        campaign["models"] = [{"id": "other", "path": _saved(model, place / "other")}]
        campaign["targets"] = [{"layers": 4}]
    campaign["methods"][0]["scoring"] |= scoring
    campaign["methods"][0]["recovery"]["objective"] = "none"
    return campaign


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("gemma3n_text", "num_kv_shared_layers=2"),
        ("rwkv", "rescale_every=2"),
    ],
)
def test_a_family_that_cannot_be_pruned_is_refused_by_the_plan(
    model_type: str, message: str, tmp_path: Path
) -> None:
    campaign = _campaign(tmp_path, tiny_decoder(model_type))
    with pytest.raises(RequestError, match=message):
        build_plan(parse_config(campaign, "campaign.yaml"))


def test_the_first_in_order_that_can_go_are_chosen(tmp_path: Path) -> None:
    """DiffLlama's λ goes by a layer's index, so that only its last layers can go."""
    diffllama = ModelSpec(_saved(tiny_model("diffllama"), tmp_path / "diffllama"))
    assert removable_layers(diffllama, (), range(6)) == (5,)
    assert choose_removable(diffllama, (), (4, 1, 5, 3, 0, 2), 2) == (5, 4)
    assert choose_removable(diffllama, (5,), (2, 3, 4, 0, 1), 1) == (4,)
    with pytest.raises(RequestError, match=r"lambda_init.*; 2 of 3 layers can go"):
        choose_removable(diffllama, (), (4, 1, 5), 3)
    llama = ModelSpec(_saved(tiny_model("llama"), tmp_path / "llama"))
    assert removable_layers(llama, (2,), (0, 1, 3, 5)) == (0, 1, 3, 5)
    assert choose_removable(llama, (), (4, 1, 5, 3), 2) == (4, 1)


def test_a_campaign_passes_over_what_cannot_go(tmp_path: Path) -> None:
    """`deepest` would take layer 4 and keep the last one."""
    campaign = _campaign(tmp_path, tiny_model("diffllama"), criterion="deepest")
    answer = iterabre("campaign", write_campaign(campaign, tmp_path / "c.yaml"))
    assert answer.exit_code == 0, answer.err
    exported = tmp_path / "runs/tiny/models/other--iterabre--seed0/4-layers"
    assert json.loads((exported / "iterabre.json").read_text())["dropped_source_layers"] == [4, 5]
    log = (tmp_path / "runs/tiny/logs/driver.log").read_text()
    assert "cannot be without layers [4], which score best; layers [5] go" in log
