"""The model card and `iterabre.json` of an exported model."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from actors.contracts import ModelRef, Origin, TextSpec
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.pruning_schedule import IterationPlan
from orchestrator.reporting.tables.tables import show
from orchestrator.storage.stage_store import installed_versions

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
    names = dict.fromkeys((*before, *after))
    table = [f"| {name} | {show(before.get(name))} | {show(after.get(name))} |" for name in names]
    unit = plan.unit
    title = f"{plan.model_id}, {iteration.layers_left} of {plan.model.num_layers} {unit}"
    source = plan.origin
    lines = [
        "---",
        _metadata(plan, title, source, after, tokens).to_yaml(),
        "---",
        "",
        f"# {title}",
        "",
        f"Made from `{_public_name(plan.model.spec.path)}` by {_how(model)} (counted from 0) "
        f"with the method `{plan.method.name}` (criterion `{plan.method.scoring.criterion}`, "
        f"recovery `{plan.method.recovery.objective}` on {tokens:,} tokens"
        f"{f' of `{_text_name(plan.recovery_text)}`' if tokens else ''}). {_licence(source)}",
        "",
        *([EMPTIED, ""] if model.zeroed else []),
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


def _metadata(
    plan: TrajectoryPlan, title: str, source: Origin, scores: Mapping[str, float], tokens: int
) -> ModelCardData:
    """The front matter: what the hub's search and its model tree read."""
    spec = plan.model.spec
    base_model = spec.path if _is_hub_id(spec.path) else source.base_model
    text = plan.recovery_text
    return ModelCardData(
        base_model=base_model,
        # The hub knows adapter, merge, quantized and finetune; a pruned model is nearest to the last.
        base_model_relation="finetune" if base_model else None,
        datasets=[text.path] if tokens and text.path and _is_hub_id(text.path) else None,
        eval_results=_eval_results(scores) or None,
        library_name="transformers",
        license=source.licence,
        license_name=source.licence_name,
        license_link=source.licence_link,
        model_name=title,
        pipeline_tag="text-generation",
        tags=["depth-pruning", "iterabre"],
    )


def _eval_results(scores: Mapping[str, float]) -> list[EvalResult]:
    """What was measured on a text, task or probe, as the hub's `model-index` has it."""
    split = ((*name.split("/", 1), value) for name, value in scores.items() if math.isfinite(value))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=subject,
            dataset_name=subject,
            metric_type=metric,
            metric_value=value,
        )
        for subject, metric, value in split
        if subject != "throughput"
    ]


def _licence(source: Origin) -> str:
    if source.licence is None:
        return "The source does not name its licence here; whatever it is, it applies."
    name = source.licence_name or source.licence
    return f"The licence of the source model applies: {name}."


def _text_name(text: TextSpec) -> str:
    return text.builtin or _public_name(str(text.path))


def _public_name(path: str) -> str:
    """A hub id or URI as it is; of a path of this machine, which means nothing elsewhere, the name alone."""
    return path if _is_hub_id(path) or "://" in path else PurePath(path).name


def _how(model: ModelRef) -> str:
    """What was done to the source's blocks, in words."""
    if model.zeroed:
        kinds = sorted({kind for _, kind in model.zeroed})
        parts = (f"the {kind} of blocks {[i for i, k in model.zeroed if k == kind]}" for kind in kinds)
        return f"emptying {' and '.join(parts)}"
    return f"{'merging' if model.merges else 'removing'} transformer blocks {list(model.dropped)}"


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and "://" not in path and not path.startswith((".", "/", "~"))
