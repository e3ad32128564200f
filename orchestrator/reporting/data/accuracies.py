"""One number for what a model still knows: its mean accuracy over tasks, and how much of it is kept."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import hypot
from statistics import mean
from typing import Any

from orchestrator.reporting.data.measured import DENSE, Measured, Number, headline_metrics, is_suite_mean

MEAN_ACCURACY = "tasks/mean"
KEPT, ABOVE_CHANCE = "kept, %", "kept above chance, %"
"""Columns of what is left of it."""
MEASURES = ("acc", "acc_norm", "exact_match")
"""Shares of questions that were answered rightly: only these are averaged with one another."""
PROBES = ("arithmetic", "degeneration", "code_failures")
CHANCE = {
    "arc_easy": 1 / 4, "arc_challenge": 1 / 4, "hellaswag": 1 / 4, "openbookqa": 1 / 4, "race": 1 / 4,
    "mmlu": 1 / 4, "piqa": 1 / 2, "copa": 1 / 2, "boolq": 1 / 2, "winogrande": 1 / 2, "blimp": 1 / 2,
    "blimp_sample": 1 / 2, "xwinograd": 1 / 2, "xstorycloze": 1 / 2, "xcopa": 1 / 2, "xnli": 1 / 3,
    "lambada_openai": 0.0, "lambada_standard": 0.0, "gsm8k": 0.0,
}  # fmt: skip
"""The accuracy of a blind guess."""


def accuracy_tasks(models: Iterable[Any]) -> list[str]:
    """Return one accuracy of each task or group of tasks that every one of the models (or entries) has."""
    models = list(models)
    return [
        name
        for name in headline_metrics(models)
        if not is_suite_mean(name)
        and name.split("/")[0] not in PROBES
        and name.rsplit("/", 1)[-1].split(",")[0] in MEASURES
        and all(name in model.numbers for model in models)
    ]


def with_mean_accuracy(models: Sequence[Measured]) -> list[Measured]:
    """Add `MEAN_ACCURACY` to the models that have all tasks of their source, if those are two at least.

    It is the plain mean over tasks, whatever their sizes; its standard error is that of independent tasks.
    The tasks are those of the unpruned model, or without it those that all have.
    """
    of_source: dict[str, list[str]] = {}
    for source in dict.fromkeys(model.model for model in models):
        own = [model for model in models if model.model == source]
        of_source[source] = accuracy_tasks([model for model in own if model.phase == DENSE] or own)
    added = []
    for model in models:
        tasks = of_source[model.model]
        found = [model.numbers[name] for name in tasks if name in model.numbers]
        if len(found) < max(len(tasks), 2):
            added.append(model)
            continue
        errors = [number.stderr or 0.0 for number in found]
        number = Number(mean(number.value for number in found), hypot(*errors) / len(errors), "")
        added.append(replace(model, numbers={**model.numbers, MEAN_ACCURACY: number}, averaged=tuple(tasks)))
    return added


def chance_of(tasks: Sequence[str]) -> float | None:
    """Return the mean accuracy of a blind guess, None if that of a task is not known."""
    known = [CHANCE.get(task.split("/")[0].removesuffix("_local")) for task in tasks]
    found = [chance for chance in known if chance is not None]
    return mean(found) if found and len(found) == len(known) else None


def kept(number: Number, dense: Number, chance: float = 0.0) -> Number | None:
    """Return the per cent that is left of an unpruned score, or of what of it is above chance.

    None where there is nothing that could be left. Its standard error takes both scores for independent,
    which makes it an upper bound: they answer the same questions.
    """
    whole = dense.value - chance
    if whole <= 0:
        return None
    share = (number.value - chance) / whole
    stderr = hypot(number.stderr or 0.0, share * (dense.stderr or 0.0)) / whole
    return Number(100 * share, 100 * stderr if stderr else None, "")
