"""Evaluation of a model in memory by an `EvaluationSpec`."""

import math
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import LongTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.artifacts import publish
from actors.contracts import (
    EvaluationResult,
    EvaluationSpec,
    Metric,
    ModelRef,
    PerplexitySpec,
    Progress,
    TextSpec,
    ThroughputSpec,
    no_progress,
)
from actors.data import load_texts, tokenize_text
from actors.evaluation.batch_size import BATCH_SIZE, batch_sizes
from actors.evaluation.kept_parts import KeptParts, KeptResponses
from actors.evaluation.lm_eval.harness import evaluate_tasks_with
from actors.evaluation.lm_eval.language_models import Responder, check_chat_template, local_responder
from actors.evaluation.lm_eval.samples import write_samples
from actors.evaluation.lm_eval.suites import suite_means
from actors.evaluation.lm_eval.task_folder import check_tasks_unchanged
from actors.evaluation.lm_eval.task_loading import check_task_data
from actors.evaluation.perplexity import token_perplexity
from actors.evaluation.probes.probes import check_probes, find_probe, run_probe
from actors.evaluation.sandbox.runner import check_sandbox
from actors.evaluation.throughput import check_length, throughput
from actors.models import build_model, load_source, places, text_config
from actors.out_of_memory import once_more_with_less

TIMED_TEXT = TextSpec(builtin="wikitext-2-raw-test")
CHARS_PER_TOKEN = 20
"""The text whose first tokens throughput is measured on; tokens of it are shorter, on average."""

MOST_NAMED = 3
"""Tasks that progress names; of more it gives the number."""

NOTHING_KEPT = KeptParts()

TEXT_MEASURES = ("token_perplexity", "loss_nats", "loss_over_log_vocab")


def evaluate_model(
    spec: EvaluationSpec,
    progress: Progress = no_progress,
    samples_uri: str | None = None,
    parts_uri: str | None = None,
) -> EvaluationResult:
    """Load the model that `spec` names onto this process's device and measure it.

    Args:
        samples_uri: where samples of the tasks are published, if the spec asks for them.
        parts_uri: where what is measured is kept, and looked for, in case that this ends before it is done.

    Raises RequestError for what cannot be had, before any weights are read, and MemoryExhaustedError
    if memory does not suffice, with half of the batch neither.
    """
    check_task_data(spec.tasks, spec.include_path, spec.num_fewshot)
    model, tokenizer = build_model(spec.model, places())
    return evaluate_as_fits(model, tokenizer, spec, progress, samples_uri, KeptParts(parts_uri))


def evaluate_as_fits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    progress: Progress = no_progress,
    samples_uri: str | None = None,
    kept: KeptParts = NOTHING_KEPT,
) -> EvaluationResult:
    """Return what `evaluate` does, with half of the batch if memory does not suffice for the whole.

    Raises MemoryExhaustedError if half does not fit either.
    """

    def measure(spec: EvaluationSpec) -> EvaluationResult:
        return evaluate(model, tokenizer, spec, progress, samples_uri, kept)

    return once_more_with_less(measure, **batch_sizes(spec))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    progress: Progress = no_progress,
    samples_uri: str | None = None,
    kept: KeptParts = NOTHING_KEPT,
) -> EvaluationResult:
    """Measure `model` on the spec's perplexity texts, its lm-eval tasks, its probes, and its speed.

    `spec.model` is what the caller has loaded; only throughput reads it, for the
    unpruned model to compare with. The tasks run together, as one call of the
    harness. Progress counts the units of each part from nothing to all: a text's windows, the
    tasks' requests of one kind, a probe's prompts, throughput's runs. Samples of the tasks go to
    `samples_uri`, if the spec asks for them. Texts, probes and responses to tasks that are `kept` are
    not measured again.

    Raises RequestError for a task, probe or text that cannot be had, before the model
    has run, WorkError if generated code that is to be run cannot be shut in.
    """
    _check(model, tokenizer, spec)
    texts = {text.name: load_texts(text.data) for text in spec.perplexity}
    total = len(spec.perplexity) + bool(spec.tasks) + len(spec.probes) + (spec.throughput is not None)
    numbers = count(1)

    def part(name: str) -> Progress:
        """Return where the next part reports its units."""
        place = f"{name}, part {next(numbers)} of {total}"
        progress(0, 1, place)  # until it knows how many they are
        return lambda done, units, unit="": progress(done, units, f"{unit} of {place}")

    metrics: list[Metric] = []
    tasks = EvaluationResult((), 0)
    versions = [(name, version(name)) for name in ("torch", "transformers")]
    for text in spec.perplexity:
        input_ids = tokenize_text(texts[text.name], tokenizer, text.max_tokens, repr(text.data.name))
        measure = partial(_perplexity, model, text, input_ids, spec.batch_size or BATCH_SIZE, part(text.name))
        metrics += kept.metrics(f"text {text.name}", measure)
    if spec.tasks:
        respond = _kept_responder(model, tokenizer, spec, part(tasks_in_words(spec)), kept)
        tasks = measure_tasks(spec, respond, tokenizer, samples_uri)
        metrics += tasks.metrics
        versions += tasks.versions
    for name in spec.probes:
        metrics += kept.metrics(f"probe {name}", partial(run_probe, name, model, tokenizer, spec, part(name)))
    if spec.throughput is not None:
        metrics += _speed(model, tokenizer, spec, spec.throughput, part("throughput"))
        cuda = model.device.type == "cuda"
        versions.append(("device", torch.cuda.get_device_name(model.device) if cuda else model.device.type))
    progress(total, total, "evaluated")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return replace(tasks, metrics=tuple(metrics), num_parameters=num_parameters, versions=tuple(versions))


def _check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: EvaluationSpec) -> None:
    """Raise for what cannot be measured, before anything is."""
    check_task_data(spec.tasks, spec.include_path, spec.num_fewshot)
    check_tasks_unchanged(spec)
    check_probes(spec.probes)
    if spec.allow_code_execution:
        check_sandbox()
    if spec.apply_chat_template and spec.tasks:
        check_chat_template(tokenizer, spec.system_instruction)
    if spec.throughput is not None:
        check_length(model, spec.throughput)


def _kept_responder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    progress: Progress,
    kept: KeptParts,
) -> Responder:
    """Return a `local_responder` that keeps its responses, piece by piece, and finds those that are kept."""
    done = total = 0

    def of_all(in_piece: int, _size: int, unit: str = "") -> None:
        progress(done + in_piece, total, unit)

    respond = local_responder(model, tokenizer, spec.batch_size, spec.max_length, of_all)

    def respond_to_missing(kind: str, requests: list[tuple[Any, ...]]) -> list[Any]:
        nonlocal done, total
        responses = KeptResponses(kept, kind, requests)
        done, total = len(requests) - len(responses.missing), len(requests)
        for piece in responses.pieces():
            responses.add(piece, respond(kind, [requests[at] for at in piece]))
            done += len(piece)
        return responses.in_order()

    return respond_to_missing


def tasks_in_words(spec: EvaluationSpec) -> str:
    """Return the tasks' names, or how many they are."""
    return ", ".join(spec.tasks) if len(spec.tasks) <= MOST_NAMED else f"{len(spec.tasks)} tasks"


def metric_names(spec: EvaluationSpec) -> tuple[list[str], list[str]]:
    """Return the names of the metrics of texts and probes, and what else is measured, by its first part."""
    names = [f"{text.name}/{measure}" for text in spec.perplexity for measure in TEXT_MEASURES]
    names += [f"{name}/{measure}" for name in spec.probes for measure in find_probe(name).gives]
    timed = [] if spec.throughput is None else ["throughput"]
    return names, [*spec.tasks, *spec.suites, *timed]


def measure_tasks(
    spec: EvaluationSpec,
    respond: Responder,
    tokenizer: PreTrainedTokenizerBase,
    samples_uri: str | None = None,
) -> EvaluationResult:
    """Measure the spec's tasks and suites by the model behind `respond`; publish samples if asked for."""
    results = evaluate_tasks_with(
        respond,
        spec.tasks,
        include_path=spec.include_path,
        limit=spec.limit,
        num_fewshot=spec.num_fewshot,
        chat=tokenizer if spec.apply_chat_template else None,
        system_instruction=spec.system_instruction,
        seed=spec.seed,
        allow_code_execution=spec.allow_code_execution,
    )
    artifact = None
    if spec.log_samples and samples_uri is not None:
        with TemporaryDirectory(prefix="iterabre-samples-") as scratch:
            write_samples(results.samples, Path(scratch))
            artifact = publish(Path(scratch), samples_uri)
    means = suite_means(results.metrics, spec.suites, spec.task_suffix)
    return EvaluationResult((*results.metrics, *means), 0, results.versions, results.num_fewshot, artifact)


def _perplexity(
    model: PreTrainedModel,
    spec: PerplexitySpec,
    input_ids: LongTensor,
    batch_size: int,
    progress: Progress,
) -> list[Metric]:
    """Return perplexity, loss, and loss over log V, 1 for uniform predictions (Gromov et al., §4)."""
    vocab_size = text_config(model.config).vocab_size
    measured = token_perplexity(model, input_ids, spec.context, batch_size, progress)
    values = (
        (measured.perplexity, "ppl"),
        (measured.loss_nats, "nats"),
        (measured.loss_nats / math.log(vocab_size), ""),
    )
    return [
        Metric(f"{spec.name}/{measure}", value, unit)
        for measure, (value, unit) in zip(TEXT_MEASURES, values, strict=True)
    ]


def _speed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    timed: ThroughputSpec,
    progress: Progress,
) -> list[Metric]:
    """Return speed and memory of the model beside those of the unpruned one, on the same tokens."""
    unpruned = spec.model == ModelRef(spec.model.source)
    dense = None if unpruned else load_source(spec.model, places())[0]
    needed = timed.batch_size * timed.context
    beginning = "".join(load_texts(TIMED_TEXT))[: needed * CHARS_PER_TOKEN]
    return throughput(model, dense, tokenize_text([beginning], tokenizer, needed), timed, progress)
