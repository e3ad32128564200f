"""Trackers hold what the ledger holds: read back with their own readers, also after repetitions."""

import json
import logging
import math
import re
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import wandb
from mlflow import MlflowClient
from mlflow.entities import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from wandb.proto.wandb_internal_pb2 import Record

from actors.artifacts import filesystem, list_files
from orchestrator.config import CampaignConfig, parse_config
from orchestrator.errors import RequestError
from orchestrator.planning.plan import CampaignPlan
from orchestrator.planning.planner import build_plan
from orchestrator.storage.ledger import Ledger, Row
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import TrajectoryStatus, write_status
from orchestrator.tracking.publisher import (
    Point,
    Publisher,
    attach_files,
    parameters,
    points,
    published,
    steps_before_iterations,
)
from orchestrator.tracking.trackers import TRACKERS, make_trackers
from tests.support.object_store import loopback_s3
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.unit.cli.command import iterabre

TRAJECTORY = "llama--iterabre--seed0"
WHEN = datetime(2026, 11, 1, 12, 0, 0, tzinfo=UTC)
PERPLEXITY = "evaluate/fox/token_perplexity"
LOSS = "recover/loss/iteration_01"
LOSS_2 = "recover/loss/iteration_02"
WHOLE_LOSS = "training/loss"
AXES = {LOSS: "training_step", LOSS_2: "training_step", WHOLE_LOSS: "global_step"}


def _row(stage: str, iteration: int, metric: str, value: float, **more: Any) -> Row:
    return Row(
        campaign="tiny", trajectory=TRAJECTORY, model="llama", method="iterabre", seed=0, key="k", when=WHEN,
        where="here", stage=stage, iteration=iteration, metric=metric, value=value, **more,
    )  # fmt: skip


PARTS = {
    "a-dense": [_row("evaluate", 0, "fox/token_perplexity", 9.5, phase="dense")],
    "b-score": [_row("score", 1, "score", 0.25, layer=2), _row("score", 1, "tokens", 64.0)],
    "c-pruned": [_row("evaluate", 1, "fox/token_perplexity", 30.0, phase="pruned")],
    "d-recover": [_row("recover", 1, "loss", 2.0 - step / 4, step=step) for step in range(3)],
    "e-recovered": [_row("evaluate", 1, "fox/token_perplexity", 12.0, phase="recovered")],
    "f-recover": [_row("recover", 2, "loss", 1.0 - step / 4, step=step) for step in range(2)],
}
CURVES = {
    PERPLEXITY: {0: 9.5, 1: 12.0},
    "evaluate_pruned/fox/token_perplexity": {1: 30.0},
    "score/score/layer_02": {1: 0.25},
    "score/tokens": {1: 64.0},
    LOSS: {0: 2.0, 1: 1.75, 2: 1.5},
    LOSS_2: {0: 1.0, 1: 0.75},
    WHOLE_LOSS: {0: 2.0, 1: 1.75, 2: 1.5, 3: 1.0, 4: 0.75},
}
FILES = {
    "campaign.json": b"{}",
    "report/index.html": b"<p>the report</p>",
    "report/figures/loss.svg": b"<svg/>",
    f"models/{TRAJECTORY}/3-layers/README.md": b"# a card",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tracked")
    tiny_campaign(directory)
    return directory


@pytest.fixture(scope="module")
def plan(place: Path) -> CampaignPlan:
    return build_plan(parse_config(tiny_campaign(place), "campaign.yaml"))


def _config(place: Path, **tracking: Any) -> CampaignConfig:
    return parse_config(tiny_campaign(place) | {"tracking": tracking}, "campaign.yaml")


def _measure(store: Store, *parts: str) -> None:
    for part in parts or PARTS:
        Ledger(store.ledger_uri).append(_part(part), PARTS[part])


def _part(name: str) -> str:
    return f"{TRAJECTORY}-{name}-all-k"


def _attach(config: CampaignConfig, store: Store, name: str) -> None:
    """Leave files in the run as a campaign does, among others, and have the tracker take them."""
    others = {f"models/{TRAJECTORY}/3-layers/model.safetensors": b"weights", "logs/driver.log": b"a line"}
    for path, content in (FILES | others).items():
        file = Path(store.uri, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    attach_files({name: make_trackers(config, store)[name]}, store)


def _publish(config: CampaignConfig, plan: CampaignPlan, store: Store, name: str) -> None:
    """As a driver does that is started, and ends."""
    Publisher(name, make_trackers(config, store)[name], plan, store).close()


def _events(directory: str) -> tuple[dict[str, dict[int, float]], HParamsPluginData]:
    """What TensorBoard shows of a directory; two values at one step are an error."""
    read = EventAccumulator(directory, size_guidance={"scalars": 0})
    read.Reload()
    curves = {}
    for tag in read.Tags()["scalars"]:
        curves[tag] = {event.step: event.value for event in read.Scalars(tag)}
        assert len(curves[tag]) == len(read.Scalars(tag)), tag
        assert {event.wall_time for event in read.Scalars(tag)} == {WHEN.timestamp()}
    described = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    return curves, HParamsPluginData.FromString(described)


def test_curves_are_named_by_stage_metric_iteration_and_layer() -> None:
    rows = [
        _row("recover", 3, "loss", 1.5, step=40, phase="start"),
        _row("score", 2, "score", math.nan, layer=11),
        _row("evaluate", 2, "humaneval/pass@1", 0.5, phase="recovered"),
        _row("evaluate", 0, "humaneval/pass@1", 0.75, phase="dense"),
    ]
    start, score, after, before = points(row.__dict__ for row in rows)
    assert start == Point("recover_start/loss/iteration_03", 1.5, 40, WHEN, "training_step")
    assert (score.name, score.step, score.axis) == ("score/score/layer_11", 2, "iteration")
    assert math.isnan(score.value)
    assert after == Point("evaluate/humaneval/pass_1", 0.5, 2, WHEN)
    assert before == Point("evaluate/humaneval/pass_1", 0.75, 0, WHEN)


def test_steps_go_on_over_recoveries_whatever_they_begin_with() -> None:
    loss = [_row("recover", iteration, "loss", 1.0, step=step) for iteration in (1, 3) for step in (1, 2, 3)]
    start = _row("recover", 3, "loss", 1.0, step=1, phase="start")
    rows = [row.__dict__ for row in (*loss, start, _row("recover", 3, "tokens", 9.0))]
    before = steps_before_iterations(rows)
    assert before == {1: 0, 3: 3}
    whole = [point.step for point in points(rows, before) if point.name == WHOLE_LOSS]
    assert whole == [1, 2, 3, 4, 5, 6]


def test_parameters_are_every_field_of_the_method(plan: CampaignPlan) -> None:
    given = parameters(plan.find(TRAJECTORY))
    assert given["model"] == "llama"
    assert given["seed"] == 0
    assert given["recovery.learning_rate"] == 0.001
    assert given["recovery.adapter.targets"] == "all-linear"
    assert "recovery.teacher" not in given
    assert all(isinstance(value, str | int | float | bool) for value in given.values())


def test_tensorboard_reads_each_number_once(place: Path, plan: CampaignPlan, tmp_path: Path) -> None:
    config, store = _config(place), Store(str(tmp_path / "run"))
    _measure(store, "a-dense", "b-score")
    _publish(config, plan, store, "tensorboard")
    state = Path(store.published_uri("tensorboard"))
    first = state.read_bytes()
    _measure(store)
    _publish(config, plan, store, "tensorboard")
    files = {info.path: info.mtime for info in list_files(store.tensorboard_uri(TRAJECTORY))}
    assert len(files) == 2
    _publish(config, plan, store, "tensorboard")
    assert {info.path: info.mtime for info in list_files(store.tensorboard_uri(TRAJECTORY))} == files
    # A driver that dies between the event file and the note of it tells the same again.
    state.write_bytes(first)
    _publish(config, plan, store, "tensorboard")
    curves, described = _events(store.tensorboard_uri(TRAJECTORY))
    assert curves == CURVES
    given = described.session_start_info.hparams
    assert given["scoring.criterion"].string_value == "hidden_cosine"
    assert given["recovery.adapter.rank"].number_value == 4


def test_tensorboard_shows_configuration_and_cards(place: Path, tmp_path: Path) -> None:
    config, store = _config(place), Store(str(tmp_path / "run"))
    assert (
        make_trackers(config, store)["tensorboard"].open() == f"tensorboard --logdir {store.uri}/tensorboard"
    )
    for _ in range(2):
        _attach(config, store, "tensorboard")
    read = EventAccumulator(store.tensorboard_uri("campaign"))
    read.Reload()
    texts = {tag: read.Tensors(tag) for tag in read.Tags()["tensors"]}
    assert set(texts) == {
        "campaign.json/text_summary",
        f"models/{TRAJECTORY}/3-layers/README.md/text_summary",
    }
    (card,) = texts[f"models/{TRAJECTORY}/3-layers/README.md/text_summary"]
    assert card.tensor_proto.string_val[0] == b"# a card"


def test_tensorboard_writes_into_an_object_store(
    place: Path, plan: CampaignPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loopback_s3(monkeypatch) as uri:
        store = Store(f"{uri}/tiny")
        _measure(store)
        _publish(_config(place), plan, store, "tensorboard")
        (info,) = list_files(store.tensorboard_uri(TRAJECTORY))
        with filesystem(uri)[0].open_input_stream(info.path) as stream:
            (tmp_path / info.base_name).write_bytes(stream.read())
    assert _events(str(tmp_path))[0] == CURVES


@pytest.fixture
def mlflow_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlruns").as_uri()


def _mlflow_runs(uri: str, experiment: str) -> list[Run]:
    client = MlflowClient(uri)
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def _mlflow_run(uri: str, experiment: str) -> tuple[Run, dict[str, dict[int, float]]]:
    client = MlflowClient(uri)
    (run,) = (run for run in _mlflow_runs(uri, experiment) if "mlflow.parentRunId" in run.data.tags)
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return run, {name: {m.step: m.value for m in history} for name, history in histories.items()}


def test_mlflow_has_one_run_of_a_trajectory_over_all_drivers(
    place: Path, plan: CampaignPlan, tmp_path: Path, mlflow_uri: str
) -> None:
    config = _config(place, mlflow={"tracking_uri": mlflow_uri, "experiment": "depth"})
    store = Store(str(tmp_path / "run"))
    _measure(store, "a-dense", "b-score")
    _publish(config, plan, store, "mlflow")
    run, _ = _mlflow_run(mlflow_uri, "depth")
    assert (run.info.run_name, run.info.status) == (TRAJECTORY, "KILLED")
    _measure(store)
    write_status(store, TRAJECTORY, TrajectoryStatus("done"))
    _publish(config, plan, store, "mlflow")
    Path(store.published_uri("mlflow")).unlink()
    _publish(config, plan, store, "mlflow")
    run, curves = _mlflow_run(mlflow_uri, "depth")
    assert curves == CURVES
    assert run.info.status == "FINISHED"
    assert run.data.params["recovery.learning_rate"] == "0.001"
    assert run.data.tags["iterabre.campaign"] == "tiny"
    assert len(_mlflow_runs(mlflow_uri, "depth")) == 2


def test_mlflow_has_a_parent_run_of_the_campaign_with_its_files(
    place: Path, plan: CampaignPlan, tmp_path: Path, mlflow_uri: str
) -> None:
    config = _config(place, mlflow={"tracking_uri": mlflow_uri})
    store = Store(str(tmp_path / "run"))
    _measure(store, "a-dense")
    told: list[str] = []
    trackers = {"mlflow": make_trackers(config, store)["mlflow"]}
    with published(trackers, plan, store, told.append):
        (parent,) = _mlflow_runs(mlflow_uri, "tiny")
        assert parent.info.status == "RUNNING"
    (address,) = told
    assert address == (
        f"tracking.mlflow: mlflow ui --backend-store-uri {mlflow_uri}  "
        f"(experiment tiny, run {parent.info.run_id})"
    )
    _attach(config, store, "mlflow")
    run, _ = _mlflow_run(mlflow_uri, "tiny")
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    client = MlflowClient(mlflow_uri)
    parent = client.get_run(parent.info.run_id)
    assert (parent.info.run_name, parent.info.status) == ("tiny", "KILLED")
    assert parent.data.params == {"models": "llama", "methods": "iterabre", "seeds": "0"}
    (tmp_path / "downloaded").mkdir()
    kept = Path(client.download_artifacts(parent.info.run_id, "", str(tmp_path / "downloaded")))
    found = {str(file.relative_to(kept)): file.read_bytes() for file in kept.rglob("*") if file.is_file()}
    assert found == FILES


def test_a_server_s_address_is_the_page_of_the_run(place: Path, tmp_path: Path, mlflow_uri: str) -> None:
    tracker: Any = make_trackers(
        _config(place, mlflow={"tracking_uri": mlflow_uri}), Store(str(tmp_path / "run"))
    )["mlflow"]
    tracker._uri, tracker._is_server = "http://mlflow:5000/", True
    assert re.fullmatch(r"http://mlflow:5000/#/experiments/\d+/runs/[0-9a-f]{32}", tracker.open())


def _wandb_records(file: Path) -> Iterator[Record]:
    """Records of a run's file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + length > len(data):
            return  # still being written
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(whole)
            whole = b""


def _ended(file: Path) -> list[Record]:
    """The records once the run's end is among them: another process writes them, a moment later."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        records = list(_wandb_records(file))
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{file} has no end")


def _wandb_curves(records: list[Record], axis: str) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    for record in records:
        found = {".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name in found.keys() & CURVES.keys():
            if axis == AXES.get(name, "iteration"):
                curves.setdefault(name, {})[found[axis]] = found[name]
    return curves


def test_wandb_offline_keeps_files_for_sync(
    place: Path, plan: CampaignPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted0wandb0key0123456789planted0wandb0")
    config = _config(place, wandb={"project": "depth"})
    store = Store(str(tmp_path / "run"))
    store.logs_dir.mkdir(parents=True)
    _measure(store, "a-dense")
    _publish(config, plan, store, "wandb")
    time.sleep(1)  # The name of its directory is the second it is made in.
    _measure(store)
    _publish(config, plan, store, "wandb")
    first, second = store.logs_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert first.name == second.name
    # The later driver's file holds the whole run, since sending it replaces what was sent of the first.
    records = _ended(max(first, second))
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, run.run_group) == ("depth", TRAJECTORY, "tiny")
    given = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert given["recovery.learning_rate"] == 0.001
    found = [_wandb_curves(records, axis) for axis in ("iteration", "training_step", "global_step")]
    assert found[0] | found[1] | found[2] == CURVES
    contents = [found.read_bytes() for found in store.logs_dir.rglob("*") if found.is_file()]
    assert not any(b"planted0wandb0key" in content for content in contents)


def test_wandb_keeps_the_files_as_an_artifact_of_the_campaign(place: Path, tmp_path: Path) -> None:
    config = _config(place, wandb={"project": "depth"})
    store = Store(str(tmp_path / "run"))
    store.logs_dir.mkdir(parents=True)
    shown = make_trackers(config, store)["wandb"].open()
    assert shown == f"wandb sync {store.logs_dir}/wandb/offline-run-*"
    _attach(config, store, "wandb")
    (file,) = store.logs_dir.glob("wandb/offline-run-*/run-*.wandb")
    records = _ended(file)
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.display_name, run.run_group) == ("tiny", "tiny")
    (logged,) = (record.artifact for record in records if record.WhichOneof("record_type") == "artifact")
    assert (logged.name, logged.type) == ("tiny", "campaign")
    kept = {entry.path: Path(entry.local_path) for entry in logged.manifest.contents}
    assert {path: kept[path].read_bytes() for path in FILES} == FILES
    # They lie in the run, from where `wandb sync` sends them, and not in a directory that goes.
    assert all(path.is_relative_to(store.uri) for path in kept.values())


def test_a_server_that_is_away_is_warned_of_once_and_reported_later(
    place: Path, plan: CampaignPlan, tmp_path: Path, mlflow_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        away = _config(place, mlflow={"tracking_uri": f"http://127.0.0.1:{unused.getsockname()[1]}"})
        store = Store(str(tmp_path / "run"))
        _measure(store)
        publisher = Publisher("mlflow", make_trackers(away, store)["mlflow"], plan, store)
        with caplog.at_level(logging.WARNING, "orchestrator.tracking.publisher"):
            publisher.open()
            publisher.publish()
            publisher.close()
    assert publisher.address is None
    (warning,) = (record for record in caplog.records if record.name == "orchestrator.tracking.publisher")
    assert "tracking.mlflow failed" in warning.getMessage()
    back = _config(place, mlflow={"tracking_uri": mlflow_uri})
    _publish(back, plan, store, "mlflow")
    assert _mlflow_run(mlflow_uri, "tiny")[1] == CURVES


def test_numbers_are_published_while_the_campaign_runs(
    place: Path, plan: CampaignPlan, tmp_path: Path
) -> None:
    config, store = _config(place), Store(str(tmp_path / "run"))
    state = Path(store.published_uri("tensorboard"))
    with published(make_trackers(config, store), plan, store, interval_s=0.02):
        _measure(store, "a-dense")
        deadline = time.monotonic() + 10
        while not state.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        _measure(store)
    assert sorted(json.loads(state.read_text())) == sorted(map(_part, PARTS))
    assert _events(store.tensorboard_uri(TRAJECTORY))[0] == CURVES


def _refused(place: Path, **tracking: Any) -> str:
    with pytest.raises(RequestError) as refusal:
        make_trackers(_config(place, **tracking), Store(str(place / "nowhere")))
    assert not (place / "nowhere").exists()
    return str(refusal.value)


def test_a_package_that_is_missing_is_reported_with_how_to_get_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", replace(TRACKERS["wandb"], package="not_installed"))  # type: ignore[arg-type]
    message = _refused(place, wandb={"project": "depth"})
    assert "tracking.wandb needs the Python package 'not_installed'" in message
    assert "pip install wandb" in message


def test_online_needs_a_key(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # It remembers the environment it first met.
    message = _refused(place, wandb={"project": "depth", "mode": "online"})
    assert "set WANDB_API_KEY" in message


def test_a_local_store_that_mlflow_refuses_is_reported(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    message = _refused(place, mlflow={"tracking_uri": str(tmp_path / "mlruns")})
    assert "tracking.mlflow.tracking_uri" in message
    assert "MLFLOW_ALLOW_FILE_STORE" in message


def test_tracking_may_change_on_resume_and_changes_no_stage(place: Path, tmp_path: Path) -> None:
    campaign = tiny_campaign(place) | {"targets": [{"layers": 3}]}
    campaign["storage"]["path"] = str(tmp_path / "runs")
    file = write_campaign(campaign, tmp_path / "campaign.yaml")
    run = tmp_path / "runs/tiny"
    assert iterabre("campaign", file, "--set", "tracking.tensorboard=false").exit_code == 0
    assert not (run / "tensorboard").exists()
    stages = {str(path): path.stat().st_mtime_ns for path in run.glob("stages/*/*/manifest.json")}
    answer = iterabre("campaign", file, "--resume")
    assert answer.exit_code == 0, answer.err
    assert f"tracking.tensorboard: tensorboard --logdir {run}/tensorboard" in answer.err
    assert (run / "tensorboard" / "campaign").exists()
    assert {str(path): path.stat().st_mtime_ns for path in run.glob("stages/*/*/manifest.json")} == stages
    read = EventAccumulator(str(run / "tensorboard" / TRAJECTORY))
    read.Reload()
    rows = Ledger(str(run / "ledger")).read().to_pylist()
    want = [row["value"] for row in rows if row["metric"] == "loss"]
    assert [event.value for event in read.Scalars(LOSS)] == pytest.approx(want)
