"""lm-evaluation-harness through its Python API: the same numbers as the `lm_eval` command."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.contracts import FewShot, Metric
from actors.evaluation.lm_eval.language_models import (
    RemoteLM,
    Responder,
    check_chat_template,
    local_responder,
)
from actors.evaluation.lm_eval.quiet import quiet
from actors.evaluation.lm_eval.suites import blimp_groups
from actors.evaluation.lm_eval.task_loading import load_tasks
from actors.evaluation.lm_eval.ties import tie_metrics
from actors.evaluation.probes.code_tasks import code_task_metrics

Versions = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TaskResults:
    """What lm-eval gives of some tasks: numbers, versions, examples in the prompts, and its samples by task.

    A sample is a document with its requests, responses and metrics, once for each filter of the task.
    """

    metrics: list[Metric]
    versions: Versions
    num_fewshot: tuple[tuple[str, int], ...]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: FewShot = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    allow_code_execution: bool = False,
) -> tuple[list[Metric], Versions]:
    """Run lm-eval tasks on a model that is in memory, on the device where it lies.

    Every numeric result becomes a metric `<task>/<metric>`, or
    `<task>/<metric>,<filter>` for a filter other than "none"; groups give their
    aggregates under their own name, and so do BLiMP's 13 groups. The global
    random states are set, as lm-eval does: seed 0 is its own default (0 for
    `random`, 1234 for the rest); another seed is added to all of them. Tasks that
    have the model write code give its failure classes, and pass@1 if
    `allow_code_execution`; those with choices `<task>/ties` if any document's
    likeliest choice has another's likelihood. `apply_chat_template` puts tasks as
    conversations, with a turn for each question and answer among their examples, and
    `system_instruction` puts a text before every prompt, as those options of the `lm_eval` command do.

    Returns the metrics and the versions of lm-eval and of each task.

    Raises RequestError as `check_task_data` does.
    """
    if apply_chat_template:
        check_chat_template(tokenizer, system_instruction)
    respond = local_responder(model, tokenizer, batch_size, max_length)
    results = evaluate_tasks_with(
        respond,
        tasks,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        chat=tokenizer if apply_chat_template else None,
        system_instruction=system_instruction,
        seed=seed,
        allow_code_execution=allow_code_execution,
    )
    return results.metrics, results.versions


def evaluate_tasks_with(
    respond: Responder,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: FewShot = None,
    chat: PreTrainedTokenizerBase | None = None,
    system_instruction: str | None = None,
    seed: int = 0,
    allow_code_execution: bool = False,
) -> TaskResults:
    """Evaluate the model behind `respond` as `evaluate_tasks` does; in conversations if `chat` is given."""
    with quiet():
        loaded = load_tasks(tuple(tasks), include_path, num_fewshot)
        random.seed(DEFAULT_RANDOM_SEED + seed)
        np.random.seed(DEFAULT_OTHER_SEED + seed)
        torch.manual_seed(DEFAULT_OTHER_SEED + seed)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(DEFAULT_OTHER_SEED + seed)
        results = lm_eval.evaluate(
            RemoteLM(respond, chat),
            loaded,
            limit=limit,
            system_instruction=system_instruction,
            apply_chat_template=chat is not None,
            fewshot_as_multiturn=chat is not None,
        )
        metrics = [metric for name, values in results["results"].items() for metric in _metrics(name, values)]
        metrics += tie_metrics(loaded["tasks"], results["samples"], results["group_subtasks"])
        metrics += code_task_metrics(results["samples"], execute=allow_code_execution)
    sizes = {name: counts["effective"] for name, counts in results["n-samples"].items()}
    task_versions = tuple((f"task:{name}", str(v)) for name, v in sorted(results["versions"].items()))
    return TaskResults(
        metrics=[*metrics, *blimp_groups(metrics, sizes)],
        versions=(("lm_eval", version("lm_eval")), *task_versions),
        num_fewshot=tuple(sorted(results["n-shot"].items())),
        samples=results["samples"],
    )


def _metrics(task: str, values: dict[str, Any]) -> Iterator[Metric]:
    """Yield metrics of one task from lm-eval's `{"acc,none": ..., "acc_stderr,none": ..., "alias": ...}`."""
    for key, value in values.items():
        measure, _, filter_name = key.partition(",")
        if not filter_name or measure.endswith("_stderr") or measure == "bypass":
            continue
        if not isinstance(value, int | float):
            continue
        stderr = values.get(f"{measure}_stderr,{filter_name}")
        name = measure if filter_name == "none" else key
        yield Metric(f"{task}/{name}", float(value), stderr=stderr if isinstance(stderr, float) else None)
