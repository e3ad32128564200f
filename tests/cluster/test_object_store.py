"""A campaign on Ray whose run is in an object store: stages, checkpoints of training, ledger and models."""

from pathlib import Path
from typing import Any

import pytest

from actors.artifacts import list_files
from orchestrator.storage.stage_store import Store
from tests.support.object_store import loopback_s3
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.unit.cli.command import iterabre
from tests.unit.execution.test_cut_connections import numbers_in

ON_RAY = {
    "scoring": {"actors": 2, "cpus": 0.5},
    "training": {"workers": 2, "cpus": 0.5},
    "evaluation": {"cpus": 0.5},
}

pytestmark = pytest.mark.long


def test_a_run_on_ray_in_an_object_store_is_that_of_a_local_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    campaign = tiny_campaign(tmp_path) | {"targets": [{"layers": 3}]}
    campaign["methods"][0]["recovery"]["checkpoint_steps"] = 4
    assert iterabre("campaign", write_campaign(campaign, tmp_path / "local.yaml")).exit_code == 0
    local = Store.of_campaign(campaign["storage"]["path"], "tiny")
    with loopback_s3(monkeypatch) as uri:
        there = campaign | {"execution": ON_RAY, "storage": {"path": uri}}
        file = write_campaign(there, tmp_path / "there.yaml")
        done = iterabre("campaign", file)
        assert done.exit_code == 0, done.err
        store = Store.of_campaign(uri, "tiny")
        got, expected = numbers_in(store), numbers_in(local)
        assert got.keys() == expected.keys()
        assert got == pytest.approx(expected, rel=2e-4, abs=1e-5)
        assert [info for info in list_files(store.uri + "/models", recursive=True) if info.size]
        before = _manifests(store)
        assert iterabre("campaign", file, "--resume").exit_code == 0
        assert _manifests(store) == before


def _manifests(store: Store) -> dict[str, Any]:
    files = list_files(store.uri + "/stages", recursive=True)
    return {info.path: info.mtime for info in files if info.base_name == "manifest.json"}
