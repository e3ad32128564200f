"""A relative path means on every worker of Ray what it means to the driver."""

from pathlib import Path

import pytest
import yaml

from tests.cluster.test_campaign import assert_same, campaign, finish, start
from tests.support.tiny_models import save_tiny

COMMIT = "0123456789" * 4


def test_a_local_model_of_a_hub_models_name_is_the_one_that_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = campaign(tmp_path, "absolute", backend="local")
    cached = tmp_path / "hub" / "models--org--model"
    save_tiny(cached / "snapshots" / COMMIT, num_layers=6, seed=7)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "org").mkdir()
    (tmp_path / "org/model").symlink_to(tmp_path / "model")
    raw = yaml.safe_load(campaign(tmp_path, "relative").read_text())
    raw["models"][0]["path"] = "org/model"
    raw["methods"][0]["recovery"]["data"]["path"] = "text.txt"
    raw["evaluation"]["perplexity"][0]["data"]["path"] = "./text.txt"
    raw["storage"]["path"] = "runs"
    (tmp_path / "relative.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.chdir(tmp_path)
    finish(start(absolute))
    finish(start(Path("relative.yaml")))
    assert_same(tmp_path / "runs/relative", tmp_path / "runs/absolute")
