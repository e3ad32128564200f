"""A stage is done if, and only if, its manifest matches what is stored."""

import json
import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from actors.artifacts import fetch, publish, read_bytes, write_bytes
from actors.contracts import (
    ArtifactRef,
    EvaluationResult,
    FileRef,
    Metric,
    RecoveryResult,
    ScoreResult,
    StepRecord,
)
from actors.errors import DamagedArtifactError, RequestError, WorkError
from orchestrator.errors import RunExistsError
from orchestrator.planning.keys import stage_key
from orchestrator.storage.layout import safe_name
from orchestrator.storage.ledger import Ledger, Row
from orchestrator.storage.run_manifest import check_run, open_run, read_run, update_run
from orchestrator.storage.stage_store import Store
from tests.support.object_store import loopback_s3

INPUTS = {"model": "abc", "dropped": [3, 4]}
SCORES = ScoreResult((0, 1), (0.1 + 0.2, -math.inf), (1, 0), 1, 8, 3)
STEP = StepRecord(1, 1024, 0.5, (("hidden", 0.25),), 1e-4, 1.0, 2.5)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    if request.param == "local":
        yield Store.of_campaign(str(tmp_path / "runs"), "demo")
        return
    monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / "cache"))
    with loopback_s3(monkeypatch) as uri:
        yield Store.of_campaign(uri, "demo")


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    return Store.of_campaign(str(tmp_path / "runs"), "demo")


def _recovered(store: Store, tmp_path: Path, key: str) -> RecoveryResult:
    """Publish an adapter as a worker would; commit nothing."""
    (tmp_path / "adapter").mkdir(exist_ok=True)
    (tmp_path / "adapter/adapter.safetensors").write_bytes(b"weights")
    adapter = publish(tmp_path / "adapter", store.payload_uri("recover", key, 0))
    return RecoveryResult(adapter, (STEP,), 1024, 10)


def _commit_recovery(store: Store, tmp_path: Path, key: str) -> RecoveryResult:
    result = _recovered(store, tmp_path, key)
    store.commit("recover", key, result, INPUTS, result.artifact, 12.5)
    return result


def test_committed_stage_is_loaded_as_it_was(store: Store, tmp_path: Path) -> None:
    key = stage_key("recover", INPUTS)
    assert store.load("recover", key, RecoveryResult) is None
    result = _commit_recovery(store, tmp_path, key)
    stored = store.load("recover", key, RecoveryResult)
    assert stored is not None
    assert stored.result == result
    assert stored.artifact == result.artifact
    assert (stored.inputs, stored.seconds, stored.kind, stored.key) == (INPUTS, 12.5, "recover", key)
    assert stored.versions["pyarrow"]


def test_numbers_that_json_lacks_survive(store: Store) -> None:
    store.commit("score", "k", SCORES, INPUTS, None, 1.0)
    assert store.load("score", "k", ScoreResult).result == SCORES
    measured = EvaluationResult((Metric("wikitext2/token_perplexity", math.nan, stderr=math.inf),), 5)
    store.commit("evaluate", "k", measured, INPUTS, None, 1.0)
    metric = store.load("evaluate", "k", EvaluationResult).result.metrics[0]
    assert math.isnan(metric.value)
    assert metric.stderr == math.inf


def test_without_a_manifest_there_is_no_result(store: Store, tmp_path: Path) -> None:
    _recovered(store, tmp_path, "k")
    write_bytes(f"{store.stage_uri('recover', 'k')}/result.json", b"{}")
    assert store.load("recover", "k", RecoveryResult) is None
    result = _commit_recovery(store, tmp_path, "k")
    assert store.load("recover", "k", RecoveryResult).result == result


@pytest.mark.parametrize("damaged", ["payload-0/adapter.safetensors", "manifest.json"], ids=os.path.basename)
def test_flipped_byte_sets_the_stage_aside(
    store: Store, tmp_path: Path, damaged: str, caplog: pytest.LogCaptureFixture
) -> None:
    _commit_recovery(store, tmp_path, "k")
    place = f"{store.stage_uri('recover', 'k')}/{damaged}"
    content = bytearray(read_bytes(place))
    content[0] ^= 1
    write_bytes(place, bytes(content))
    assert Store(store.uri, verify=True).load("recover", "k", RecoveryResult) is None
    assert "quarantined" in caplog.text
    aside = caplog.text.split("quarantined in ")[1].split(" ")[0]
    assert read_bytes(f"{aside}/{damaged}") == bytes(content)
    assert read_bytes(f"{store.stage_uri('recover', 'k')}/manifest.json") is None
    result = _commit_recovery(store, tmp_path, "k")
    assert store.load("recover", "k", RecoveryResult).result == result


def test_missing_payload_sets_the_stage_aside(local_store: Store, tmp_path: Path) -> None:
    result = _commit_recovery(local_store, tmp_path, "k")
    Path(result.artifact.uri, "adapter.safetensors").unlink()
    assert local_store.load("recover", "k", RecoveryResult) is None


def test_first_commit_of_a_key_stays(local_store: Store) -> None:
    local_store.commit("score", "k", SCORES, INPUTS, None, 1.0)
    other = replace(SCORES, num_tokens=9)
    assert local_store.commit("score", "k", other, INPUTS, None, 2.0).result == SCORES


def test_payload_that_is_not_seen_here_is_explained(local_store: Store) -> None:
    ghost = ArtifactRef(local_store.payload_uri("recover", "k", 0), (FileRef("a", 1, "0"),))
    with pytest.raises(WorkError, match=r"storage\.path must be one that all nodes share"):
        local_store.commit("recover", "k", SCORES, INPUTS, ghost, 1.0)
    assert local_store.load("recover", "k", ScoreResult) is None


def test_a_moved_run_still_loads(local_store: Store, tmp_path: Path) -> None:
    result = _commit_recovery(local_store, tmp_path, "k")
    Path(local_store.uri).rename(tmp_path / "moved")
    moved = Store(str(tmp_path / "moved"))
    stored = moved.load("recover", "k", RecoveryResult)
    assert stored.artifact.uri == moved.payload_uri("recover", "k", 0)
    assert stored.result.artifact == stored.artifact
    assert stored.artifact.files == result.artifact.files


def test_key_depends_on_kind_and_inputs_but_not_on_their_order() -> None:
    assert stage_key("score", {"a": 1, "b": 2}) == stage_key("score", {"b": 2, "a": 1})
    assert (
        len({stage_key("score", {"a": 1}), stage_key("score", {"a": 2}), stage_key("prune", {"a": 1})}) == 3
    )


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "/etc", "a\\b", "a\n", "a b", "x" * 201])
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="cannot be used in a path"):
        safe_name(name)


def test_every_path_lies_within_the_run(local_store: Store) -> None:
    for build in (
        lambda: Store.of_campaign("runs", "../other"),
        lambda: local_store.stage_uri("score", "../../x"),
        lambda: local_store.models_uri("..", 3),
        lambda: local_store.train_uri("a/b"),
        lambda: Ledger(local_store.ledger_uri).append("../x", []),
    ):
        with pytest.raises(RequestError):
            build()


def test_run_is_opened_once_then_resumed(store: Store) -> None:
    config: dict[str, Any] = {"name": "demo", "seeds": (0, 1), "execution": {"backend": "ray"}}
    check_run(store, resume=False)
    open_run(store, config)
    assert read_run(store)["config"]["seeds"] == [0, 1]
    with pytest.raises(RunExistsError, match=r"demo holds a run; continue it with --resume"):
        check_run(store, resume=False)
    check_run(store, resume=True)
    open_run(store, {"name": "other"})
    assert read_run(store)["config"]["name"] == "demo"


def test_a_run_that_goes_on_changed_keeps_what_it_was(local_store: Store) -> None:
    open_run(local_store, {"name": "demo", "seeds": [0]}, {"t": 1})
    started = read_run(local_store)["created_at"]
    update_run(local_store, {"name": "demo", "seeds": [0, 1]}, {"t": 1, "u": 1}, (), [], ["seeds: 1"])
    update_run(local_store, {"name": "demo", "seeds": [1]}, {"u": 1}, (), [], ["seeds: 0"])
    header = read_run(local_store)
    assert (header["created_at"], header["planned"]) == (started, {"u": 1})
    assert [(former["config"]["seeds"], former["changes"]) for former in header["former"]] == [
        ([0], ["seeds: 1"]),
        ([0, 1], ["seeds: 0"]),
    ]


def test_resume_of_nothing_starts_a_run(local_store: Store) -> None:
    check_run(local_store, resume=True)


def test_directory_of_something_else_is_left_alone(store: Store) -> None:
    write_bytes(f"{store.uri}/photos/cat.jpg", b"cat")
    for resume in (False, True):
        with pytest.raises(RunExistsError, match="is not empty and holds no run"):
            check_run(store, resume)


def test_storage_is_checked_before_work_starts(store: Store) -> None:
    store.check_writable(needed_bytes=1)
    check_run(store, resume=False)


def test_too_little_space_is_reported(local_store: Store) -> None:
    with pytest.raises(RequestError, match=rf"{local_store.uri} has [\d,]+ bytes free, but about 1,0{{3}}"):
        local_store.check_writable(needed_bytes=10**18)


def test_storage_that_is_no_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RequestError, match="cannot be written"):
        Store.of_campaign(str(tmp_path / "runs"), "demo").check_writable()


def test_ledger_on_the_same_storage(store: Store) -> None:
    row = Row(
        campaign="c", trajectory="t", model="m", method="i", seed=0, iteration=1, stage="prune", key="k",
        metric="layers", value=3.0,
    )  # fmt: skip
    ledger = Ledger(store.ledger_uri)
    assert not ledger.has("t-1-prune-k")
    assert ledger.read().num_rows == 0
    ledger.append("t-1-prune-k", [row])
    ledger.append("t-1-prune-k", [row])
    assert ledger.has("t-1-prune-k")
    assert ledger.read()["value"].to_pylist() == [3.0]


WRITER = """
import sys
from pathlib import Path
from actors.artifacts import publish
from actors.contracts import RecoveryResult
from orchestrator.storage.stage_store import Store

store = Store(sys.argv[1])
for number in range(100_000):
    adapter = publish(Path(sys.argv[2]), store.payload_uri("recover", f"k{number}", 0))
    result = RecoveryResult(adapter, (), number, 10)
    store.commit("recover", f"k{number}", result, {}, adapter, 1.0)
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.013, 0.029])
def test_sigkill_of_a_writer_never_leaves_half_a_result(
    local_store: Store, tmp_path: Path, delay_s: float
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/a").write_bytes(b"0" * 2**22)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, local_store.uri, str(tmp_path / "adapter")])
    deadline = time.monotonic() + 60
    while not Path(local_store.stage_uri("recover", "k2"), "manifest.json").exists():
        assert writer.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay_s)
    writer.kill()
    writer.wait()
    begun = sorted(Path(local_store.uri, "stages/recover").iterdir(), key=lambda p: int(p.name[1:]))
    loaded = [local_store.load("recover", stage.name, RecoveryResult) for stage in begun]
    assert all(loaded[:-1])
    assert [stage.result.tokens for stage in loaded if stage] == list(range(sum(map(bool, loaded))))
    assert not Path(local_store.uri, "stages/quarantine").exists()


def test_a_job_of_a_cluster_keeps_no_run_in_its_own_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Store.of_campaign("runs", "demo").uri.endswith("/runs/demo")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for relative in ("runs", "./runs", "../runs"):
        with pytest.raises(RequestError, match=f"storage.path '{relative}' is relative, and in a Ray job"):
            Store.of_campaign(relative, "demo")
    for lasting in ("/nfs/runs", "~/runs", "file:///nfs/runs"):
        assert Store.of_campaign(lasting, "demo").uri.endswith("/runs/demo")


def test_of_two_committers_the_second_takes_the_result_of_the_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is faster: it commits while the first one is about to write its manifest."""
    mine, theirs = replace(SCORES, num_tokens=1), replace(SCORES, num_tokens=2)
    rival: list[Any] = []

    def hostname() -> str:
        if not rival:
            rival.append(None)
            rival[0] = Store(store.uri).commit("score", "k", theirs, INPUTS, None, 1.0)
        return "host"

    monkeypatch.setattr("socket.gethostname", hostname)
    assert store.commit("score", "k", mine, INPUTS, None, 1.0).result == theirs
    assert rival[0].result == theirs
    assert store.load("score", "k", ScoreResult).result == theirs


def test_a_finished_stage_is_not_hashed_again_unless_asked_for(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _commit_recovery(store, tmp_path, "k")

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the payload was read")

    monkeypatch.setattr("orchestrator.storage.stage_store.sha256_of", refused)
    assert store.load("recover", "k", RecoveryResult) is not None
    with pytest.raises(AssertionError, match="the payload was read"):
        Store(store.uri, verify=True).load("recover", "k", RecoveryResult)


def test_a_payload_with_another_etag_is_read_and_taken_if_the_same(store: Store, tmp_path: Path) -> None:
    """As after a copy to another bucket: ETags of uploads in parts depend on the parts."""
    _commit_recovery(store, tmp_path, "k")
    uri = f"{store.stage_uri('recover', 'k')}/manifest.json"
    manifest = json.loads(read_bytes(uri))
    assert ("etags" in manifest) == store.uri.startswith("s3://")
    write_bytes(uri, json.dumps(manifest | {"etags": {"adapter.safetensors": "other"}}).encode())
    assert store.load("recover", "k", RecoveryResult) is not None


def test_a_damaged_payload_is_found_where_it_is_used_and_the_stage_quarantined(
    local_store: Store, tmp_path: Path
) -> None:
    result = _commit_recovery(local_store, tmp_path, "k")
    Path(result.artifact.uri, "adapter.safetensors").write_bytes(b"WEIGHTS")
    assert local_store.load("recover", "k", RecoveryResult) is not None
    with pytest.raises(DamagedArtifactError) as damaged:
        fetch(result.artifact)
    assert pickle.loads(pickle.dumps(damaged.value)).uri == result.artifact.uri
    assert local_store.quarantine_artifact(damaged.value.uri)
    assert local_store.load("recover", "k", RecoveryResult) is None
    assert not local_store.quarantine_artifact("/elsewhere/payload-0")


FORMER_MANIFEST = {
    "format": 1,
    "kind": "score",
    "key": "k",
    "inputs": INPUTS,
    "payload": None,
    "seconds": 2.5,
    "created_at": "2026-11-01T00:00:00+00:00",
    "host": "node",
    "versions": {"pyarrow": "26"},
}


def test_a_stage_of_the_version_before_is_loaded(local_store: Store) -> None:
    home = Path(local_store.stage_uri("score", "k"))
    home.mkdir(parents=True)
    content = json.dumps(asdict(replace(SCORES, scores=(0.5, 0.25)))).encode()
    named = {"name": "result.json", "size_bytes": len(content), "sha256": sha256(content).hexdigest()}
    (home / "result.json").write_bytes(content)
    (home / "manifest.json").write_text(json.dumps(FORMER_MANIFEST | {"result": named}))
    stored = local_store.load("score", "k", ScoreResult)
    assert (stored.result.scores, stored.seconds, stored.waited_s) == ((0.5, 0.25), 2.5, 0.0)
    assert local_store.peek("score", "k", ScoreResult) == stored.result
    (home / "result.json").write_bytes(content.replace(b"0.5", b"0.6"))
    assert local_store.load("score", "k", ScoreResult) is None


def test_waiting_is_stored_beside_the_seconds(local_store: Store) -> None:
    local_store.commit("score", "k", SCORES, INPUTS, None, 1.0, waited_s=7.0)
    stored = local_store.load("score", "k", ScoreResult)
    assert (stored.seconds, stored.waited_s) == (1.0, 7.0)
