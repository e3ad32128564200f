"""The model card of an exported model."""

import math
from collections.abc import Iterable, Mapping
from pathlib import PurePath

from huggingface_hub import EvalResult, ModelCardData

from actors.contracts import ModelRef, Origin
from orchestrator.export.provenance import LedgerRow, recovery_tokens, scores_of
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.pruning_schedule import IterationPlan
from orchestrator.reporting.tables.tables import show


def model_card(
    plan: TrajectoryPlan,
    iteration: IterationPlan,
    model: ModelRef,
    rows: Iterable[LedgerRow],
    note: str | None = None,
) -> str:
    """Return the README.md of an exported model, with the hub's metadata block.

    Args:
        note: for users of some runtimes, as in `ExportResult`.
    """
    rows = list(rows)
    before = scores_of(rows, plan.id, 0, "dense")
    after = scores_of(rows, plan.id, iteration.index, "recovered")
    tokens = recovery_tokens(rows, plan.id, iteration.index)
    names = dict.fromkeys((*before, *after))
    table = [f"| {name} | {show(before.get(name))} | {show(after.get(name))} |" for name in names]
    title = f"{plan.model_id}, {iteration.layers_left} of {plan.model.num_layers} layers"
    source, text = plan.origin, plan.recovery_text
    change = f"{'merging' if model.merges else 'removing'} transformer blocks {list(model.dropped)}"
    licence = "The source does not name its licence here; whatever it is, it applies."
    if source.licence is not None:
        licence = f"The licence of the source model applies: {source.licence_name or source.licence}."
    lines = [
        "---",
        _metadata(plan, title, source, after, tokens).to_yaml(),
        "---",
        "",
        f"# {title}",
        "",
        f"Made from `{_public_name(plan.model.spec.path)}` by {change} (counted from 0) "
        f"with the method `{plan.method.name}` (criterion `{plan.method.scoring.criterion}`, "
        f"recovery `{plan.method.recovery.objective}` on {tokens:,} tokens"
        f"{f' of `{text.builtin or _public_name(str(text.path))}`' if tokens else ''}). {licence}",
        "",
        f"| measure | source, {plan.model.num_layers} layers | this model |",
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
        *(["## Runtimes", "", f"Note: {note}.", ""] if note else []),
    ]
    return "\n".join(lines)


def _metadata(
    plan: TrajectoryPlan, title: str, source: Origin, scores: Mapping[str, float], tokens: int
) -> ModelCardData:
    """Return the front matter: what the hub's search and its model tree read."""
    spec = plan.model.spec
    base_model = spec.path if _is_hub_id(spec.path) else source.base_model
    text = plan.recovery_text
    return ModelCardData(
        base_model=base_model,
        # The hub has adapter, merge, quantized and finetune; a pruned model is nearest to the last.
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
    """Return what was measured on a text, task or probe, as the hub's `model-index` has it."""
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


def _public_name(path: str) -> str:
    """Return a hub id or URI as it is; of a path, which means nothing elsewhere, the name alone."""
    return path if _is_hub_id(path) or "://" in path else PurePath(path).name


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and "://" not in path and not path.startswith((".", "/", "~"))
