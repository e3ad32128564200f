"""What a report is made of, read from a run that is finished or not."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from actors.artifacts import join, list_files, read_bytes
from orchestrator.reporting.html import Source
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.run_manifest import read_run
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import read_statuses

HASHED = ("score", "recover", "evaluate")
"""Stages that read a model or data."""


def read_source(store: Store) -> Source:
    """Read all that the run at `store` has so far; of sweeps, those that lie under `sweeps/` in it."""
    stored = read_run(store) or {}
    ledger = Ledger(store.ledger_uri).read()
    statuses = read_statuses(store)
    return Source(
        ledger,
        stored.get("config", {}),
        stored.get("versions", {}),
        stored.get("planned", {}),
        stored.get("trajectories", ()),
        {name: status.reason for name, status in statuses.items() if status.state == "failed"},
        [name for name, status in statuses.items() if status.state == "stopped"],
        read_hashes(store, ledger),
        read_sweeps(store),
    )


def read_hashes(store: Store, ledger: pa.Table) -> dict[str, str]:
    """Read SHA-256 (hex) of every source model and data set, from a manifest a source, method and stage."""
    wanted = ledger.filter(pc.is_in(ledger["stage"], pa.array(HASHED)))
    columns = ["model", "method", "stage"]
    rows = wanted.group_by(columns, use_threads=False).aggregate([("key", "first")]).to_pylist()
    found: dict[str, str] = {}
    for row in rows:
        text = store.read_manifest(row["stage"], row["key_first"])
        found |= dict(hashes_of(json.loads(text)["inputs"], row["model"], row["method"]) if text else ())
    return dict(sorted(found.items()))


def hashes_of(inputs: Mapping[str, Any], model: str, method: str) -> Iterator[tuple[str, str]]:
    """Return the hashes of what a stage read, by what it is, from the inputs in its manifest."""
    yield f"model {model}", inputs["model"]["source"]
    if sha := inputs.get("calibration"):
        yield f"calibration data of {method}", sha
    if sha := inputs.get("data"):
        yield f"recovery data of {method}", sha
    for text in inputs.get("perplexity") or ():
        yield f"perplexity data {text['name']}", text["data"]


def read_sweeps(store: Store) -> list[Mapping[str, Any]]:
    """Read the contents of every `sweeps/NAME/sweep.json`, by name."""
    files = list_files(join(store.uri, "sweeps"), recursive=True)
    paths = sorted(file.path for file in files if file.base_name == "sweep.json")
    names = [path.rsplit("/", 2)[-2] for path in paths]
    texts = [read_bytes(join(store.uri, "sweeps", name, "sweep.json")) for name in names]
    return [json.loads(text) for text in texts if text]
