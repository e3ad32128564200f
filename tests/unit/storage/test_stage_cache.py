"""Stages that runs share by key, and the cache that they lie in."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.artifacts import publish, read_bytes, write_bytes
from actors.contracts import ExportResult, RecoveryResult, ScoreResult
from orchestrator.config import StorageConfig
from orchestrator.storage.garbage_collector import collect
from orchestrator.storage.layout import RunLayout
from orchestrator.storage.stage_cache import CachedStage, cached_stages, prunable, verified_stages
from orchestrator.storage.stage_store import Store
from tests.support.object_store import loopback_s3

SCORES = ScoreResult((0, 1), (0.5, 0.25), (1, 0), 1, 8, 3)
DAY = 86_400.0


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path)
        return
    with loopback_s3(monkeypatch) as uri:
        yield uri


def _store(place: str, name: str) -> Store:
    return Store.of_config(StorageConfig(path=f"{place}/runs", cache=f"{place}/cache"), name)


def _recover(store: Store, tmp_path: Path, key: str) -> RecoveryResult:
    (tmp_path / "adapter").mkdir(exist_ok=True)
    (tmp_path / "adapter/weights").write_bytes(key.encode())
    result = RecoveryResult(publish(tmp_path / "adapter", store.payload_uri("recover", key, 1)), (), 0, 0)
    return store.commit("recover", key, result, {}, result.artifact, 1.0).result


def test_a_stage_of_one_run_is_there_for_another_and_an_export_is_not(place: str, tmp_path: Path) -> None:
    first, second = _store(place, "first"), _store(place, "second")
    recovered = _recover(first, tmp_path, "r")
    first.commit("score", "s", SCORES, {}, None, 1.0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes(b"{}")
    exported = ExportResult(publish(tmp_path / "model", first.models_uri("t", 3)), 3, 10)
    first.commit("export", "e", exported, {}, exported.artifact, 1.0)
    assert second.load("recover", "r", RecoveryResult).result == recovered
    assert recovered.artifact.uri == f"{place}/cache/stages/recover/r/payload-1"
    assert second.peek("score", "s", ScoreResult) == SCORES
    assert second.load("export", "e", ExportResult) is None
    assert first.load("export", "e", ExportResult).result == exported
    collect(first)
    assert second.load("recover", "r", RecoveryResult) is not None


def test_what_a_run_had_before_it_used_a_cache_is_still_found(place: str, tmp_path: Path) -> None:
    recovered = _recover(Store(f"{place}/runs/demo"), tmp_path, "r")
    assert _store(place, "demo").load("recover", "r", RecoveryResult).result == recovered


def test_checkpoints_of_a_recovery_in_the_cache_are_removed(place: str, tmp_path: Path) -> None:
    store = _store(place, "demo")
    write_bytes(store.train_uri("r") + "/step_2/state.json", b"{}")
    write_bytes(store.train_uri("other") + "/step_2/state.json", b"{}")
    _recover(store, tmp_path, "r")
    collect(store)
    assert read_bytes(store.train_uri("r") + "/step_2/state.json") is None
    assert read_bytes(store.train_uri("other") + "/step_2/state.json") is not None


def test_a_damaged_stage_of_the_cache_is_found_and_computed_again(place: str, tmp_path: Path) -> None:
    store = _store(place, "demo")
    for key in ("a", "b"):
        _recover(store, tmp_path, key)
    store.commit("score", "s", SCORES, {}, None, 1.0)
    write_bytes(f"{place}/cache/stages/recover/b/payload-1/weights", b"B")
    found = {(stage.kind, stage.key): wrong for stage, wrong in verified_stages(RunLayout(f"{place}/cache"))}
    assert found.pop(("recover", "b")) == "payload file weights does not match the manifest"
    assert found == {("recover", "a"): None, ("score", "s"): None}
    assert store.load("recover", "b", RecoveryResult) is None
    kinds = {stage.kind: stage.finished for stage in cached_stages(RunLayout(f"{place}/cache"))}
    assert kinds == {"recover": True, "score": True, "quarantine": False}


def test_use_is_noted(tmp_path: Path) -> None:
    store = _store(str(tmp_path), "demo")
    store.commit("score", "s", SCORES, {}, None, 1.0)
    manifest = tmp_path / "cache/stages/score/s/manifest.json"
    os.utime(manifest, (1000.0, 1000.0))
    (before,) = cached_stages(RunLayout(str(tmp_path / "cache")))
    store.load("score", "s", ScoreResult)
    (after,) = cached_stages(RunLayout(str(tmp_path / "cache")))
    assert before.last_used == before.created == after.created == 1000.0
    assert time.time() - after.last_used < 60


STAGES = [
    CachedStage("score", "today", 10, 0.0, 99.5 * DAY, True),
    CachedStage("recover", "half-today", 10, 0.0, 99.5 * DAY, False),
    CachedStage("recover", "half", 10, 0.0, 98.0 * DAY, False),
    CachedStage("quarantine", "x", 10, 0.0, 98.0 * DAY, False),
    CachedStage("recover", "week", 30, 0.0, 93.0 * DAY, True),
    CachedStage("recover", "month", 40, 0.0, 70.0 * DAY, True),
]


@pytest.mark.parametrize(
    ("unused_days", "keep", "gone"),
    [
        (1000.0, None, ["half"]),
        (20.0, None, ["month", "half"]),
        (5.0, None, ["month", "week", "half"]),
        (1.0, None, ["month", "week", "half", "x"]),
        (None, 75, ["month", "half"]),
        (None, 0, ["month", "week", "half", "x"]),
    ],
)
def test_what_nobody_used_goes_first_and_what_is_new_stays(
    unused_days: float | None, keep: float | None, gone: list[str]
) -> None:
    assert [s.key for s in prunable(STAGES, 100.0 * DAY, unused_days, keep)] == gone
