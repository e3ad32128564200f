"""What an exported model is and how to make it again: `iterabre.json`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from actors.contracts import ModelRef, TextSpec
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.pruning_schedule import IterationPlan
from orchestrator.storage.stage_manifest import installed_versions

LedgerRow = Mapping[str, Any]


def provenance(
    plan: TrajectoryPlan, iteration: IterationPlan, model: ModelRef, rows: Iterable[LedgerRow]
) -> str:
    """Return all that is needed to say what the exported model is and to make it again, as JSON."""
    rows = list(rows)
    content = {
        "source_model": asdict(plan.model.spec) | {"fingerprint": plan.model.fingerprint},
        "source_layers": plan.model.num_layers,
        "layers": iteration.layers_left,
        "dropped_source_layers": list(model.dropped),
        "granularity": plan.granularity,
        "emptied_sub_blocks": [list(sub_block) for sub_block in model.zeroed],
        "merges": [asdict(merge) for merge in model.merges],
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
        "versions": installed_versions(),
    }
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def scores_of(rows: Iterable[LedgerRow], trajectory: str, iteration: int, phase: str) -> dict[str, float]:
    """Return what was measured of one model: metric name to value."""
    return {
        row["metric"]: row["value"]
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
