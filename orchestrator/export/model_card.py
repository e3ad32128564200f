"""The model card of an exported model."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from actors.contracts import CLOSED_FORM_OBJECTIVES, ExportResult, ModelRef, Origin, TextSpec
from orchestrator.export.hub_datasets import HubDataset, is_hub_id, task_dataset, text_dataset
from orchestrator.export.provenance import LedgerRow, measured_of, recovery_tokens
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.planning.pruning_schedule import IterationPlan
from orchestrator.reporting.tables.tables import show, show_error

TEMPLATES = Path(__file__).parent / "templates"

HUB_METRICS = {"acc": "accuracy", "acc_norm": "accuracy", "exact_match": "exact_match", "rougeL": "rouge"}
"""The hub's types of metrics; what ends in `perplexity` is one, too, and any other is named as it is."""

VERSIONS = ("iterabre", "lm-eval", "transformers", "torch")


def model_card(
    plan: TrajectoryPlan,
    iteration: IterationPlan,
    model: ModelRef,
    rows: Iterable[LedgerRow],
    result: ExportResult,
    address: str,
    versions: Mapping[str, str],
) -> str:
    """Return the README.md of an exported model, with the hub's metadata block.

    Args:
        address: where it is: a path, a URI, or an id of the hub.
        versions: of the packages that made it.
    """
    rows = [row for row in rows if row["trajectory"] == plan.id and row["iteration"] <= iteration.index]
    before = measured_of(rows, plan.id, 0, "dense")
    after = measured_of(rows, plan.id, iteration.index, "recovered")
    tokens = recovery_tokens(rows, plan.id, iteration.index)
    title = f"{plan.model_id}, {iteration.layers_left} of {plan.model.num_layers} layers"
    licence = "The source does not name its licence here; whatever it is, it applies."
    if plan.origin.licence is not None:
        name = plan.origin.licence_name or plan.origin.licence
        licence = f"The licence of the source model applies: {name}."
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"show": show, "cell": _cell}
    return environment.get_template("model_card.md.j2").render(
        card_data=_metadata(plan, title, plan.origin, after, tokens).to_yaml(),
        title=title,
        source=_public_name(plan.model.spec.path),
        source_layers=plan.model.num_layers,
        plan=plan,
        iteration=iteration,
        num_parameters=result.num_parameters,
        licence=licence,
        is_on_hub=is_hub_id(address),
        # A path of this machine means nothing to those who get the model.
        load_from=address if is_hub_id(address) else PurePath(address).name,
        merges=model.merges,
        removed=model.dropped,
        removals=[row for row in rows if (row["stage"], row["metric"]) == ("prune", "dropped")],
        training=_training(plan, rows, tokens),
        names=tuple(dict.fromkeys((*before, *after))),
        before=before,
        after=after,
        conditions=list(_conditions(plan, [*before.values(), *after.values()], versions)),
        limitations=list(_limitations(plan, tokens)),
        note=result.note,
    )


def _cell(row: LedgerRow | None) -> str:
    """Write a number with its standard error."""
    if row is None:
        return show(None)
    error = row.get("stderr")
    return show(row["value"]) + (f" ± {show_error(error)}" if error else "")


def _training(plan: TrajectoryPlan, rows: Sequence[LedgerRow], tokens: int) -> dict[str, str]:
    """Return the settings of the recoveries, by their names; none if nothing was recovered."""
    if not tokens:
        return {}
    recovery, adapter = plan.method.recovery, plan.method.recovery.adapter
    recovered = {row["iteration"] for row in rows if (row["stage"], row["metric"]) == ("recover", "tokens")}
    steps = [row for row in rows if (row["stage"], row["metric"], row["phase"]) == ("recover", "loss", None)]
    found = {
        "objective": f"`{recovery.objective}`" + (f" after `{recovery.start}`" if recovery.start else ""),
        "text": _text_name(plan.recovery_text),
        "tokens": f"{tokens:,} in {len(recovered)} recoveries" if len(recovered) > 1 else f"{tokens:,}",
        "tokens a sequence": str(recovery.sequence_length),
        "seed": str(plan.seed),
    }
    if recovery.objective in CLOSED_FORM_OBJECTIVES:
        return found
    trained = "all weights"
    if adapter.kind != "full":
        targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
        trained = f"{adapter.kind}, rank {adapter.rank}, alpha {adapter.alpha or adapter.rank:g}, {targets}"
    if recovery.objective == "kd":
        loss = recovery.loss
        weights = {
            "hidden states": loss.hidden,
            "attention": loss.attention,
            f"logits ({loss.logit_loss})": loss.logits,
            "next token": loss.next_token,
        }
        found["loss"] = " + ".join(f"{weight:g} × {name}" for name, weight in weights.items() if weight)
    return found | {
        "teacher": f"`{_public_name((recovery.teacher or plan.model.spec).path)}`",
        "trained": trained,
        "optimizer steps": f"{len(steps):,} of {recovery.batch_size} sequences",
        "learning rate": f"{recovery.learning_rate:g}, {recovery.lr_schedule}, "
        f"{recovery.warmup_steps} steps of warm-up",
        "precision": recovery.precision or plan.model.spec.dtype,
    }


def _conditions(
    plan: TrajectoryPlan, measured: Sequence[LedgerRow], versions: Mapping[str, str]
) -> Iterator[str]:
    """Yield how the numbers were measured, a sentence each."""
    evaluation = plan.evaluation
    if evaluation.tasks:
        shots = evaluation.num_fewshot
        if isinstance(shots, tuple):
            named = ", ".join(f"{number} for {name}" for name, number in shots)
            fewshot = f"{named}, else the task's own number"
        else:
            fewshot = "each task's own number" if shots is None else f"{shots}, where a task does not set 0"
        limit = "all" if evaluation.limit is None else f"the first {evaluation.limit} of each task"
        yield f"Tasks by lm-evaluation-harness; n-shot: {fewshot}; documents: {limit}."
        template = (
            "by the model's chat template" if evaluation.apply_chat_template else "without chat template"
        )
        longest = f", inputs of {evaluation.max_length} tokens at most" if evaluation.max_length else ""
        yield f"Prompts {template}{longest}; seed {evaluation.seed}."
        if evaluation.system_instruction:
            yield f"Text before every prompt: “{evaluation.system_instruction}”"
    for text in evaluation.perplexity:
        part = f"its first {text.max_tokens:,} tokens" if text.max_tokens else "the whole text"
        name = _text_name(text.data)
        yield f"`{text.name}`: {name}, {part} in windows of {text.context} that do not overlap."
    if measured:
        if any(row.get("stderr") for row in measured):
            yield "± is the standard error over a task's documents."
        days = sorted({f"{row['when']:%Y-%m-%d}" for row in measured})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        yield f"Weights in {plan.model.spec.dtype}. Measured {when}."
    found = ", ".join(f"{name} {versions[name]}" for name in VERSIONS if name in versions)
    yield f"Versions: {found}."


def _limitations(plan: TrajectoryPlan, tokens: int) -> Iterator[str]:
    """Yield what a user should not expect of the model, or read from its numbers."""
    healed = f"recovered on {tokens:,} tokens" if tokens else "not trained afterwards"
    yield (
        f"Blocks are gone, and the model was {healed}. Knowledge, arithmetic and long answers suffer more "
        "than multiple choice shows (On the Limits of Layer Pruning, arXiv 2602.01997)."
    )
    if plan.evaluation.limit or any(text.max_tokens for text in plan.evaluation.perplexity):
        yield (
            "Some numbers above are of a part of the documents: they compare the two models here, and not "
            "with published numbers."
        )
    texts = [plan.recovery_text, *(text.data for text in plan.evaluation.perplexity)]
    is_wikitext = ["wikitext" in _text_name(text) for text in texts]
    if tokens and is_wikitext[0] and any(is_wikitext[1:]):
        yield "The text of the recovery is of the same domain as that of the perplexity, which flatters it."
    yield (
        "Safety, bias and conduct in conversation were not measured. What the source's card says of them "
        "holds here at best."
    )


def _metadata(
    plan: TrajectoryPlan, title: str, source: Origin, measured: Mapping[str, LedgerRow], tokens: int
) -> ModelCardData:
    """Return the front matter: what the hub's search and its model tree read."""
    spec = plan.model.spec
    base_model = spec.path if is_hub_id(spec.path) else source.base_model
    text = text_dataset(plan.recovery_text) if tokens else None
    return ModelCardData(
        base_model=base_model,
        # The hub has adapter, merge, quantized and finetune; a pruned model is nearest to the last.
        base_model_relation="finetune" if base_model else None,
        datasets=[text.path] if text else None,
        eval_results=_eval_results(plan, measured) or None,
        library_name="transformers",
        license=source.licence,
        license_name=source.licence_name,
        license_link=source.licence_link,
        model_name=title,
        pipeline_tag="text-generation",
        tags=["depth-pruning", "iterabre"],
    )


def _eval_results(plan: TrajectoryPlan, measured: Mapping[str, LedgerRow]) -> list[EvalResult]:
    """Return what was measured on data sets of the hub, as its `model-index` has it."""
    texts = {text.name: text_dataset(text.data) for text in plan.evaluation.perplexity}
    shots = plan.evaluation.num_fewshot
    results = []
    for name, row in measured.items():
        subject, metric = name.split("/", 1)
        data: HubDataset | None = texts.get(subject) or task_dataset(subject)
        if data is None or not math.isfinite(row["value"]) or metric == "ties":
            continue
        plain = metric.split(",")[0]
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=data.path,
                dataset_name=subject,
                dataset_config=data.config,
                dataset_split=data.split,
                dataset_args={"num_few_shot": shots}
                if isinstance(shots, int) and subject not in texts
                else None,
                metric_type="perplexity" if plain.endswith("perplexity") else HUB_METRICS.get(plain, plain),
                metric_name=metric,
                metric_value=row["value"],
            )
        )
    return results


def _text_name(text: TextSpec) -> str:
    """Return what a text is called, as code, with its configuration and split."""
    if text.builtin:
        return f"`{text.builtin}`"
    name = _public_name(str(text.path))
    return (
        f"`{name}`" if name != text.path else f"`{' '.join(filter(None, (name, text.config, text.split)))}`"
    )


def _public_name(path: str) -> str:
    """Return a hub id or URI as it is; of a path, which means nothing elsewhere, the name alone."""
    return path if is_hub_id(path) or "://" in path else PurePath(path).name
