"""What an exported model is and how to make it again: `iterabre.json`."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from actors.contracts import ModelRef, TextSpec
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.pruning_schedule import IterationPlan
from orchestrator.storage.stage_manifest import installed_versions

LedgerRow = Mapping[str, Any]

MODEL = (
    "dropped_source_layers",
    "merges",
    "adapters_sha256",
    "weights_sha256",
)
"""The fields that say, with the source's fingerprint, which model it is."""

SCORES = ("scores", "scores_of_source")


def provenance(
    plan: TrajectoryPlan, iteration: IterationPlan, model: ModelRef, rows: Iterable[LedgerRow]
) -> dict[str, Any]:
    """Return all that is needed to say what the exported model is and to make it again, as JSON values."""
    rows = list(rows)
    return {
        "source_model": asdict(plan.model.spec) | {"fingerprint": plan.model.fingerprint},
        "source_layers": plan.model.num_layers,
        "layers": iteration.layers_left,
        "dropped_source_layers": list(model.dropped),
        "merges": [{**asdict(merge), "merged": list(merge.merged)} for merge in model.merges],
        "adapters_sha256": [adapter.sha256 for adapter in model.adapters],
        "weights_sha256": model.weights and model.weights.sha256,
        "campaign": plan.campaign,
        "trajectory": plan.id,
        "iteration": iteration.index,
        "seed": plan.seed,
        "method": plan.method.model_dump(mode="json"),
        "recovery_tokens": recovery_tokens(rows, plan.id, iteration.index),
        "data_sha256": {
            text.builtin or str(text.path): fingerprint
            for text, fingerprint in plan.fingerprints.items()
            if isinstance(text, TextSpec)
        },
        "scores": scores_of(rows, plan.id, iteration.index, "recovered"),
        "scores_of_source": scores_of(rows, plan.id, 0, "dense"),
        "versions": dict(installed_versions()),
    }


def is_of(provenance: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two provenances are of one model, however and whenever it was made."""
    sources = [each.get("source_model", {}).get("fingerprint") for each in (provenance, other)]
    return sources[0] == sources[1] and all(provenance.get(name) == other.get(name) for name in MODEL)


def with_scores(provenance: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return `provenance` with the scores of `measured`."""
    return {**provenance, **{name: measured[name] for name in SCORES}}


def scores_of(rows: Iterable[LedgerRow], trajectory: str, iteration: int, phase: str) -> dict[str, float]:
    """Return what was measured of one model: metric name to value."""
    measured = measured_of(rows, trajectory, iteration, phase)
    return {name: row["value"] for name, row in measured.items()}


def measured_of(
    rows: Iterable[LedgerRow], trajectory: str, iteration: int, phase: str
) -> dict[str, LedgerRow]:
    """Return the rows of what was measured of one model, by the metric's name."""
    return {
        row["metric"]: row
        for row in rows
        if (row["trajectory"], row["iteration"], row["stage"], row["phase"])
        == (trajectory, iteration, "evaluate", phase)
        and "/" in row["metric"]
    }


def recovery_tokens(rows: Iterable[LedgerRow], trajectory: str, up_to_iteration: int) -> int:
    """Return the tokens seen by all recoveries up to an iteration."""
    return int(
        sum(
            row["value"]
            for row in rows
            if row["trajectory"] == trajectory
            and row["iteration"] <= up_to_iteration
            and (row["stage"], row["metric"]) == ("recover", "tokens")
        )
    )
