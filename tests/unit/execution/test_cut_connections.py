"""A campaign on an S3-speaking server whose connections break in the middle of an upload."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from actors.artifacts import filesystem, list_files
from actors.contracts import EvaluationResult, ExportResult, RecoveryResult, ScoreResult
from orchestrator.execution import trial
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.stage_store import Store
from tests.support.cutting_proxy import cutting_proxy
from tests.support.faulty_s3 import faulty_s3
from tests.support.object_store import loopback_s3
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.unit.cli.command import iterabre

RESULTS: dict[str, Any] = {
    "score": ScoreResult,
    "recover": RecoveryResult,
    "evaluate": EvaluationResult,
    "export": ExportResult,
}
OF_THE_MACHINE = ("s", "tokens/s", "bytes", "forwards")


def numbers_in(store: Store) -> dict[tuple[Any, ...], float]:
    """Every measured number that says nothing of the machine: its speed, its memory, what it kept."""
    names = ("iteration", "stage", "phase", "metric", "step", "layer")
    rows = Ledger(store.ledger_uri).read().to_pylist()
    return {tuple(r[name] for name in names): r["value"] for r in rows if r["unit"] not in OF_THE_MACHINE}


def _finished(store: Store) -> dict[tuple[str, str], Any]:
    """Every stage that has a manifest, checked byte for byte, and when it was committed."""
    found = {}
    for info in list_files(store.uri + "/stages", recursive=True):
        kind, key, name = info.path.split("/")[-3:]
        if name == "manifest.json":
            stage = store.load(kind, key, RESULTS[kind])
            assert stage is not None, f"{kind} {key} has a manifest and is not whole"
            found[kind, key] = info.mtime
    return found


def test_an_upload_that_is_cut_is_no_result_and_resume_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "LOST_TRIAL_RETRIES", 0)
    campaign = tiny_campaign(tmp_path) | {"targets": [{"layers": 3}]}
    file = write_campaign(campaign, tmp_path / "campaign.yaml")
    assert iterabre("campaign", file).exit_code == 0
    undisturbed = Store.of_campaign(campaign["storage"]["path"], "tiny")
    with loopback_s3(monkeypatch) as uri:
        server = urlsplit(os.environ["AWS_ENDPOINT_URL"])
        with cutting_proxy((server.hostname or "", server.port or 0)) as cutting:
            monkeypatch.setenv("AWS_ENDPOINT_URL", cutting.endpoint)
            command = ("campaign", file, "--resume", "--set", f"storage.path={uri}")
            store = Store.of_campaign(uri, "tiny")
            # Room for manifests and ledger, not for the weights of an adapter.
            cutting.after_bytes = 12_000
            cut = iterabre(*command, "--set", "storage.retry_s=3")
            assert cutting.cuts > 0
            assert cut.exit_code == 1, cut.err
            assert "cannot write" in " ".join(cut.out.split() + cut.err.split())
            assert "Traceback" not in cut.err
            cutting.after_bytes = None
            before = _finished(store)
            assert {kind for kind, _ in before} >= {"score", "evaluate"}
            assert "recover" not in {kind for kind, _ in before}
            assert len(numbers_in(store)) > 0

            resumed = iterabre(*command)
            assert resumed.exit_code == 0, resumed.err
            after = _finished(store)
            assert {stage: after[stage] for stage in before} == before
            assert after.keys() == _finished(undisturbed).keys()
            assert numbers_in(store) == pytest.approx(numbers_in(undisturbed), rel=1e-6)
            fs, root = filesystem(store.uri)
            assert fs.get_file_info(f"{root}/driver.lock").type.name == "NotFound"


def test_on_storage_that_fails_at_random_a_campaign_is_as_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / "cache"))
    campaign = tiny_campaign(tmp_path) | {"targets": [{"layers": 3}]}
    file = write_campaign(campaign, tmp_path / "campaign.yaml")
    assert iterabre("campaign", file).exit_code == 0
    undisturbed = Store.of_campaign(campaign["storage"]["path"], "tiny")
    with (
        loopback_s3(monkeypatch) as uri,
        faulty_s3(os.environ["AWS_ENDPOINT_URL"], seed=1, rate=0.1) as faults,
    ):
        clean = os.environ["AWS_ENDPOINT_URL"]
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.endpoint)
        done = iterabre("campaign", file, "--set", f"storage.path={uri}")
        assert done.exit_code == 0, done.err
        assert sum(faults.done.values()) > 5
        monkeypatch.setenv("AWS_ENDPOINT_URL", clean)
        store = Store.of_campaign(uri, "tiny")
        assert _finished(store).keys() == _finished(undisturbed).keys()
        assert numbers_in(store) == pytest.approx(numbers_in(undisturbed), rel=1e-6)
