"""What a report is made of, read from runs that are finished or not."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from actors.artifacts import join, list_files, read_bytes
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.run_manifest import read_run
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import read_statuses

HASHED = ("score", "recover", "evaluate")
"""Stages that read a model or data."""


@dataclass(frozen=True)
class Source:
    """What a report is made of.

    Attributes:
        ledger: all rows of the run so far.
        config: the configuration that the run was started with.
        versions: of the packages, when it was started.
        planned: iterations of each trajectory, by its id, as far as known.
        trajectories: id, model, method and depths of all that are planned, as far as known.
        failures: reason of every trajectory that failed.
        given_up: trajectories that the scheduler or an operator ended.
        hashes: of source models and data, by what they are.
        sweeps: contents of every `sweep.json` of the run.
        exports: where the model lies that a trajectory left with so many layers.
        stages: where the stages lie, seen from the report's directory; None where no link leads there.
        notes: what to know before comparing its numbers.
    """

    ledger: pa.Table
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    planned: Mapping[str, int] = field(default_factory=dict)
    trajectories: Sequence[Mapping[str, Any]] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    given_up: Sequence[str] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    sweeps: Sequence[Mapping[str, Any]] = ()
    exports: Mapping[tuple[str, int], str] = field(default_factory=dict)
    stages: str | None = "../stages"
    notes: Sequence[str] = ()


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
        [name for name, status in statuses.items() if status.state in ("stopped", "cancelled")],
        read_hashes(store, ledger),
        read_sweeps(store),
        exported_models(store, ledger),
    )


def exported_models(store: Store, ledger: pa.Table) -> dict[tuple[str, int], str]:
    """Return where each exported model lies that is still there, by trajectory and layers left."""
    rows = ledger.filter((pc.field("stage") == "export") & (pc.field("metric") == "layers"))
    places = [
        (row["trajectory"], int(row["value"])) for row in rows.select(["trajectory", "value"]).to_pylist()
    ]
    return {place: uri for place in places if list_files(uri := store.models_uri(*place))}


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
