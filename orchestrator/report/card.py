"""The model card and `iterabre.json` of an exported model."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from actors.contracts import ModelRef, TextSpec
from orchestrator.plan import TrajectoryPlan
from orchestrator.schedule import IterationPlan
from orchestrator.store import installed_versions

LedgerRow = Mapping[str, Any]

EMPTIED = (
    "An emptied sub-block is stored as zeros and adds nothing: the model computes what one without it would, "
    "but in plain transformers it takes as much memory and time as before."
)
"""What a user of a model with emptied sub-blocks must know."""


def scores_of(rows: Iterable[LedgerRow], trajectory: str, iteration: int, phase: str) -> dict[str, float]:
    """What was measured of one model: metric name to value."""
    return {
        row["metric"]: row["value"]
        for row in rows
        if (row["trajectory"], row["iteration"], row["stage"], row["phase"])
        == (trajectory, iteration, "evaluate", phase)
        and "/" in row["metric"]
    }


def provenance(
    plan: TrajectoryPlan, iteration: IterationPlan, model: ModelRef, rows: Iterable[LedgerRow]
) -> str:
    """All that is needed to say what the exported model is and to make it again, as JSON."""
    rows = list(rows)
    content = {
        "source_model": asdict(plan.model.spec) | {"fingerprint": plan.model.fingerprint},
        "source_layers": plan.model.num_layers,
        "layers": iteration.layers_left,
        "dropped_source_layers": list(model.dropped),
        "granularity": plan.granularity,
        "emptied_sub_blocks": [list(sub_block) for sub_block in model.emptied],
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


def recovery_tokens(rows: Iterable[LedgerRow], trajectory: str, up_to_iteration: int) -> int:
    """Tokens seen by all recoveries up to an iteration."""
    return int(
        sum(
            row["value"]
            for row in rows
            if row["trajectory"] == trajectory
            and row["iteration"] <= up_to_iteration
            and (row["stage"], row["metric"]) == ("recover", "tokens")
        )
    )


def model_card(
    plan: TrajectoryPlan, iteration: IterationPlan, model: ModelRef, rows: Iterable[LedgerRow]
) -> str:
    """The README.md of an exported model, with the hub's metadata block."""
    rows = list(rows)
    before = scores_of(rows, plan.id, 0, "dense")
    after = scores_of(rows, plan.id, iteration.index, "recovered")
    tokens = recovery_tokens(rows, plan.id, iteration.index)
    source = plan.model.spec.path
    table = [f"| {name} | {before.get(name, float('nan')):.4g} | {after[name]:.4g} |" for name in after]
    unit = plan.unit
    base_model = [f"base_model: {source}"] if _is_hub_id(source) else []
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *base_model,
        "tags: [depth-pruning, iterabre]",
        "---",
        "",
        f"# {plan.model_id}, {iteration.layers_left} of {plan.model.num_layers} {unit}",
        "",
        f"Made from `{source}` by {_how(model)} (counted from 0) "
        f"with the method `{plan.method.name}` (criterion `{plan.method.scoring.criterion}`, "
        f"recovery `{plan.method.recovery.objective}` on {tokens:,} tokens). "
        "The licence of the source model applies.",
        "",
        *([EMPTIED, ""] if model.emptied else []),
        f"| measure | source, {plan.model.num_layers} {unit} | this model |",
        "|---|---|---|",
        *table,
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this-directory")',
        'tokenizer = AutoTokenizer.from_pretrained("this-directory")',
        "```",
        "",
        "`iterabre.json` holds the settings, data hashes, versions and scores.",
        "",
    ]
    return "\n".join(lines)


def _how(model: ModelRef) -> str:
    """What was done to the source's blocks, in words."""
    if model.emptied:
        kinds = sorted({kind for _, kind in model.emptied})
        parts = (f"the {kind} of blocks {[i for i, k in model.emptied if k == kind]}" for kind in kinds)
        return f"emptying {' and '.join(parts)}"
    return f"{'merging' if model.merges else 'removing'} transformer blocks {list(model.dropped)}"


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and "://" not in path and not path.startswith((".", "/", "~"))
