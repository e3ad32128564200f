"""What interrupted attempts left goes; results, and what a resumed recovery needs, stay."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.artifacts import filesystem, list_files, publish, write_bytes
from actors.contracts import EvaluationResult, RecoveryResult
from orchestrator.storage.garbage_collector import collect
from orchestrator.storage.stage_store import Store
from tests.support.object_store import loopback_s3

INPUTS = {"model": "abc"}


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    if request.param == "local":
        yield Store.of_campaign(str(tmp_path / "runs"), "demo")
        return
    with loopback_s3(monkeypatch) as uri:
        yield Store.of_campaign(uri, "demo")


def _attempt(store: Store, tmp_path: Path, key: str, attempt: int) -> RecoveryResult:
    """Publish an adapter and a checkpoint as workers would; commit nothing."""
    (tmp_path / "adapter").mkdir(exist_ok=True)
    (tmp_path / "adapter/adapter.safetensors").write_bytes(b"weights")
    write_bytes(store.train_uri(key) + "/step_000002/state.json", b"{}")
    return RecoveryResult(publish(tmp_path / "adapter", store.payload_uri("recover", key, attempt)), (), 0, 0)


def _files(store: Store) -> set[str]:
    _, root = filesystem(store.uri)
    return {info.path.removeprefix(root + "/") for info in list_files(store.uri, recursive=True)}


def test_what_no_manifest_names_goes_and_the_rest_stays(store: Store, tmp_path: Path) -> None:
    _attempt(store, tmp_path, "done", 1)
    result = _attempt(store, tmp_path, "done", 2)
    store.commit("recover", "done", result, INPUTS, result.artifact, 1.0)
    _attempt(store, tmp_path, "interrupted", 3)
    write_bytes(store.stage_uri("score", "half") + "/result.json", b"{}")
    store.commit("evaluate", "measured", EvaluationResult((), 0), INPUTS, None, 1.0)
    for key in ("measured", "half-measured"):
        write_bytes(store.parts_uri(key) + "/metrics.json", b"[]")
    for damaged in ("quarantine", "set-aside"):  # the latter by an earlier version
        write_bytes(f"{store.uri}/stages/{damaged}/score-x/result.json", b"{}")
    collect(store)
    assert _files(store) == {
        "stages/recover/done/manifest.json",
        "stages/recover/done/payload-2/adapter.safetensors",
        "stages/quarantine/score-x/result.json",
        "stages/set-aside/score-x/result.json",
        "train/interrupted/step_000002/state.json",
        "stages/evaluate/measured/manifest.json",
        "parts/half-measured/metrics.json",
    }
    assert store.load("recover", "done", RecoveryResult) is not None
    collect(store)
    assert store.load("recover", "done", RecoveryResult) is not None


def test_files_that_a_killed_writer_left_go(tmp_path: Path) -> None:
    store = Store.of_campaign(str(tmp_path), "demo")
    write_bytes(store.run_manifest_uri, b"{}")
    half = Path(store.uri) / "ledger" / ".part.parquet.17-abcd.tmp"
    half.parent.mkdir()
    half.write_bytes(b"PAR1")
    collect(store)
    assert not half.exists()
    assert _files(store) == {"campaign.json"}


def test_nothing_goes_where_a_manifest_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store.of_campaign(str(tmp_path), "demo")
    write_bytes(store.stage_uri("score", "damaged") + "/manifest.json", b"{")
    _attempt(store, tmp_path, "interrupted", 1)
    before = _files(store)
    with caplog.at_level(logging.WARNING):
        collect(store)
    assert _files(store) == before
    assert "manifest.json is damaged" in caplog.text


def test_a_run_that_does_not_exist_has_no_leftovers(store: Store) -> None:
    collect(store)
    assert _files(store) == set()
