"""Models and texts of the hub are resolved to commits: those are recorded and read from then on."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from actors.contracts import ModelSpec, TextSpec
from actors.data import describe_text, load_texts
from actors.errors import RequestError
from actors.models import describe_model
from actors.models.loading import source
from actors.models.loading.load import open_model
from orchestrator.config import parse_config
from orchestrator.planning.planner import build_plan
from orchestrator.planning.recorded import continue_plan, record_trajectories
from orchestrator.storage.run_manifest import open_run
from orchestrator.storage.stage_store import Store
from tests.support.tiny_campaign import tiny_campaign
from tests.support.tiny_models import save_tiny

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one model, org/tiny, at its first commit; the hub itself is out of reach."""
    place = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / "cache"))
    _commit(place, FIRST, num_layers=4)
    return place


def _commit(hub: Path, commit: str, num_layers: int) -> None:
    """Let the branch main of org/tiny be a commit that holds a model of so many layers."""
    place = hub / "models--org--tiny"
    save_tiny(place / "snapshots" / commit, num_layers=num_layers)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs/main").write_text(commit)
    source._download.cache_clear()


def test_a_model_is_read_at_the_commit_that_the_plan_found(hub: Path) -> None:
    info = describe_model(ModelSpec("org/tiny"))
    assert info.spec.commit == FIRST
    _commit(hub, SECOND, num_layers=3)
    model, _ = open_model(info.spec)
    assert model.config.num_hidden_layers == 4
    assert describe_model(ModelSpec("org/tiny")).spec.commit == SECOND
    assert describe_model(ModelSpec("org/tiny", revision=FIRST)).fingerprint == info.fingerprint


def test_a_local_model_has_no_commit(tmp_path: Path) -> None:
    assert describe_model(ModelSpec(save_tiny(tmp_path / "m"))).spec.commit is None


def test_a_new_commit_of_a_model_is_found_on_resume(hub: Path, tmp_path: Path) -> None:
    raw = tiny_campaign(tmp_path)
    raw["models"][0]["path"] = "org/tiny"

    def changes(**model: Any) -> list[str]:
        config = parse_config({**raw, "models": [{**raw["models"][0], **model}]}, "c.yaml")
        return [f"{each.effect.name} {each}" for each in continue_plan(build_plan(config), config, store)[1]]

    config, store = parse_config(raw, "c.yaml"), Store(str(tmp_path / "run"))
    plan = build_plan(config)
    (trajectory,) = plan.trajectories
    made = {"trajectory": trajectory.id, "model": "llama", "method": "iterabre"}
    open_run(store, config.model_dump(mode="json"), trajectories=[made])
    record_trajectories(store, plan.trajectories)
    assert changes() == []
    _commit(hub, SECOND, num_layers=5)
    assert changes() == [f"CONTRADICTION models.llama (commit): {FIRST} → {SECOND}"]
    # The way back that the refusal names.
    assert changes(revision=FIRST) == [f'HARMLESS models.llama.revision: (not given) → "{FIRST}"']


@pytest.fixture
def data_hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub with one data set, org/data; `asked` are the revisions that were asked for."""
    state: dict[str, Any] = {"main": FIRST, "asked": []}

    def builder(path: str, config: str | None, revision: str | None = None) -> Any:
        assert path == "org/data"
        return SimpleNamespace(hash=revision or state["main"])

    def load(path: str, config: str | None, split: str, revision: str | None = None) -> Dataset:
        state["asked"].append(revision)
        commit = revision or state["main"]
        return Dataset.from_dict({"text": [f"of {commit[:1]}"]})

    monkeypatch.setattr("actors.data.hf_datasets.load_dataset_builder", builder)
    monkeypatch.setattr("actors.data.hf_datasets.load_dataset", load)
    return state


def test_a_data_set_is_read_at_the_commit_that_the_plan_found(data_hub: dict[str, Any]) -> None:
    found = describe_text(TextSpec(path="org/data"))
    assert found.spec.commit == FIRST
    data_hub["main"] = SECOND
    assert load_texts(found.spec) == ["of 1"]
    assert set(data_hub["asked"]) == {FIRST}
    newer = describe_text(TextSpec(path="org/data"))
    assert newer.spec.commit == SECOND
    assert newer.fingerprint != found.fingerprint
    assert describe_text(TextSpec(path="org/data", revision=FIRST)).fingerprint == found.fingerprint


def test_what_is_no_hub_data_set_has_no_revision(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a line\n")
    for place in ({"path": str(tmp_path / "text.txt")}, {"builtin": "wikitext-2-raw-test"}):
        assert describe_text(TextSpec(**place)).spec.commit is None
        with pytest.raises(RequestError, match="is no data set of the hub and has no revision 'main'"):
            describe_text(TextSpec(**place, revision="main"))
    shutil.rmtree(tmp_path)
