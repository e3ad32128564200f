"""Several runs as one, to compare them in one report."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.reporting.data.measured import DENSE, headline_metrics, is_speed, measured_models
from orchestrator.reporting.run_source import Source
from orchestrator.reporting.tables.metric_names import named
from orchestrator.reporting.tables.tables import show

SAME = 0.005
"""Numbers of one unpruned model that are no further apart, as a share, were measured alike."""


def join_sources(runs: Mapping[str, Source]) -> Source:
    """Return several runs, by their names, as one.

    A method that several runs have is named `METHOD (RUN)`, and so is a model that is not the same in all of
    them. Trajectories are named `RUN: TRAJECTORY`.
    """
    methods = Counter(name for run in runs.values() for name in _unique(run, "method"))
    hashes: dict[str, set[str]] = {}
    for run in runs.values():
        for name in _unique(run, "model"):
            hashes.setdefault(name, set()).add(run.hashes.get(f"model {name}", ""))
    # What is not read yet has no hash.
    others = {name for name, found in hashes.items() if len(found - {""}) > 1}

    def own_names(run: str) -> dict[str, Callable[[str], str]]:
        return {
            "trajectory": lambda name: f"{run}: {name}",
            "method": lambda name: f"{name} ({run})" if methods[name] > 1 else name,
            "model": lambda name: f"{name} ({run})" if name in others else name,
        }

    renamed = {run: _renamed(source, run, own_names(run)) for run, source in runs.items()}
    models: dict[str, Any] = {}
    for source in renamed.values():
        models |= {model["id"]: model for model in source.config.get("models") or []}
    first, *_ = renamed.values()
    return Source(
        pa.concat_tables(source.ledger for source in renamed.values()),
        {
            "name": " and ".join(runs),
            "models": list(models.values()),
            "methods": _methods_beside_each_other(runs, renamed),
            "runs": {run: dict(source.config) for run, source in runs.items()},
        },
        first.versions,
        {name: count for source in renamed.values() for name, count in source.planned.items()},
        [one for source in renamed.values() for one in source.trajectories],
        {name: reason for source in renamed.values() for name, reason in source.failures.items()},
        [name for source in renamed.values() for name in source.given_up],
        {what: sha for source in renamed.values() for what, sha in source.hashes.items()},
        [sweep for source in renamed.values() for sweep in source.sweeps],
        {place: uri for source in renamed.values() for place, uri in source.exports.items()},
        notes=[
            *(
                f"{name} is not the same model in all runs: each has its own name here"
                for name in sorted(others)
            ),
            *_differences(renamed),
        ],
    )


def _unique(source: Source, column: str) -> list[str]:
    return pc.unique(source.ledger[column]).to_pylist()


def _methods_beside_each_other(
    runs: Mapping[str, Source], renamed: Mapping[str, Source]
) -> list[Mapping[str, Any]]:
    """Return the methods that the runs have measured, those that had one name one after the other."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run, source in runs.items():
        own, new = (each.config.get("methods") or [] for each in (source, renamed[run]))
        measured = _unique(source, "method")
        for before, after in zip(own, new, strict=True):
            if before["name"] in measured:
                found.setdefault(before["name"], []).append(after)
    return [method for same in found.values() for method in same]


def _renamed(source: Source, run: str, names: Mapping[str, Callable[[str], str]]) -> Source:
    """Return the source with the names that its parts have among other runs."""
    trajectory, method, model = names["trajectory"], names["method"], names["model"]
    ledger = source.ledger
    for column, rename in names.items():
        new = {name: rename(name) for name in _unique(source, column)}
        values = pa.array([new[name] for name in ledger[column].to_pylist()], pa.string())
        ledger = ledger.set_column(ledger.schema.get_field_index(column), ledger.schema.field(column), values)
    config = dict(source.config)
    config["models"] = [{**one, "id": model(one["id"])} for one in config.get("models") or []]
    config["methods"] = [{**one, "name": method(one["name"])} for one in config.get("methods") or []]
    return Source(
        ledger,
        config,
        source.versions,
        {trajectory(name): count for name, count in source.planned.items()},
        [
            {**one, "trajectory": trajectory(one["trajectory"]), "method": method(one["method"]),
             "model": model(one["model"])}
            for one in source.trajectories
        ],
        {trajectory(name): reason for name, reason in source.failures.items()},
        [trajectory(name) for name in source.given_up],
        {f"{run}: {what}": sha for what, sha in source.hashes.items()},
        source.sweeps,
        {(trajectory(name), layers): uri for (name, layers), uri in source.exports.items()},
    )  # fmt: skip


def _differences(runs: Mapping[str, Source]) -> list[str]:
    """Say which metrics the runs measured differently: those that differ for one unpruned model."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for run, source in runs.items():
        dense = [model for model in measured_models(source.ledger) if model.phase == DENSE]
        for one, metric in ((one, metric) for one in dense for metric in headline_metrics(dense)):
            if metric in one.numbers and not is_speed(metric):
                found.setdefault(one.model, {}).setdefault(metric, {})[run] = one.numbers[metric].value
    notes = []
    for model, metrics in found.items():
        told = [
            f"{named(metric)} {', '.join(f'{show(value)} in {run}' for run, value in values.items())}"
            for metric, values in metrics.items()
            if max(values.values()) - min(values.values()) > SAME * max(map(abs, values.values()))
        ]
        if told:
            notes.append(
                f"The runs did not measure alike, so that these numbers do not compare between them: "
                f"unpruned, {model} has {'; '.join(told)}"
            )
    return notes
