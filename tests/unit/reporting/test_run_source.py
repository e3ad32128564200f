"""What a report is made of is found in the run itself."""

import json
from pathlib import Path

from orchestrator.reporting.run_source import exported_models, read_source
from orchestrator.storage.ledger import Ledger, Row
from orchestrator.storage.run_manifest import open_run
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import TrajectoryStatus, write_status
from tests.unit.reporting.sample_run import sample_ledger

SCORE = {"model": {"source": "aa"}, "calibration": "bb"}
EVALUATE = {"model": {"source": "aa"}, "perplexity": [{"name": "wikitext2", "data": "cc"}]}


def test_hashes_come_from_manifests_and_sweeps_from_their_directory(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    planned = [{"trajectory": "t", "model": "smol", "method": "a", "depths": [9, 8, 7]}]
    open_run(store, {"name": "demo"}, planned={"t": 3}, trajectories=planned)
    write_status(store, "gone", TrajectoryStatus("stopped", "given up"))
    write_status(store, "cancelled", TrajectoryStatus("cancelled", "by an operator"))
    place = {"campaign": "demo", "trajectory": "t", "model": "smol", "method": "a", "seed": 0, "iteration": 1}
    rows = []
    for kind, inputs in (("score", SCORE), ("evaluate", EVALUATE)):
        home = Path(store.stage_uri(kind, f"{kind}-key"))
        home.mkdir(parents=True)
        (home / "manifest.json").write_text(json.dumps({"inputs": inputs}))
        rows.append(Row(**place, stage=kind, key=f"{kind}-key", metric="seconds", value=1.0))  # type: ignore[arg-type]
    # A stage whose manifest is gone is passed over.
    rows.append(Row(**place, stage="recover", key="lost", metric="seconds", value=1.0))  # type: ignore[arg-type]
    Ledger(store.ledger_uri).append("t", rows)
    sweep = tmp_path / "run/sweeps/by-layer"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text('{"model": "smol"}')
    source = read_source(store)
    assert (source.planned, source.trajectories) == ({"t": 3}, planned)
    assert sorted(source.given_up) == ["cancelled", "gone"]
    assert source.hashes == {
        "model smol": "aa",
        "calibration data of a": "bb",
        "perplexity data wikitext2": "cc",
    }
    assert source.sweeps == [{"model": "smol"}]


def test_exported_models_are_those_that_are_still_there(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    ledger = sample_ledger(store.ledger_uri, ("t",))
    assert exported_models(store, ledger) == {}
    directory = Path(store.models_uri("t", 8))
    directory.mkdir(parents=True)
    assert exported_models(store, ledger) == {}
    (directory / "config.json").write_text("{}")
    assert exported_models(store, ledger) == {("t", 8): str(directory)}
