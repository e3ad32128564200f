"""lm-evaluation-harness through its Python API: the same numbers as the `lm_eval` command.

Besides the harness's own tasks, those in `tasks/` beside this file are always known.
"""

import contextlib
import copy
import io
import logging
import os
import random
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.contracts import Metric
from actors.errors import RequestError, WorkError, unknown_name
from actors.evaluation.code_tasks import code_task_metrics

TASKS = Path(__file__).resolve().parent / "tasks"
"""Our own tasks; `lm_eval --include_path` of this folder runs them too."""

Versions = tuple[tuple[str, str], ...]


def check_tasks(tasks: Sequence[str], include_path: str | None = None) -> None:
    """Raise RequestError unless every name is a task, group or tag that may run.

    Refused are unknown names, an `include_path` that is no folder, and tasks
    that execute generated code. No data are loaded.
    """
    if tasks:
        _task_manager(tuple(tasks), include_path)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    allow_code_execution: bool = False,
) -> tuple[list[Metric], Versions]:
    """Run lm-eval tasks on a model that is in memory, on the device where it lies.

    Every numeric result becomes a metric `<task>/<metric>`, or
    `<task>/<metric>,<filter>` for a filter other than "none"; groups give their
    aggregates under their own name. The global random states are set, as
    lm-eval does: seed 0 is its own default (0 for `random`, 1234 for the rest);
    another seed is added to all of them. Tasks that have the model write code
    give its failure classes, and pass@1 if `allow_code_execution`.

    Returns the metrics and the versions of lm-eval and of each task.

    Raises RequestError as `check_tasks` does, WorkError if a task's data cannot be read.
    """
    manager = _task_manager(tuple(tasks), include_path)
    _set_seeds(seed)
    with _quiet():
        loaded = _load(manager, tasks, num_fewshot, seed)
        # HFLM sets a missing pad token on the tokenizer it is given; the caller's stays as it is.
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        results = lm_eval.evaluate(lm, loaded, limit=limit)
    metrics = [metric for name, values in results["results"].items() for metric in _metrics(name, values)]
    metrics += code_task_metrics(results["samples"], execute=allow_code_execution)
    task_versions = tuple((f"task:{name}", str(v)) for name, v in sorted(results["versions"].items()))
    return metrics, (("lm_eval", version("lm_eval")), *task_versions)


def _set_seeds(seed: int) -> None:
    random.seed(DEFAULT_RANDOM_SEED + seed)
    np.random.seed(DEFAULT_OTHER_SEED + seed)
    torch.manual_seed(DEFAULT_OTHER_SEED + seed)


def _load(manager: TaskManager, tasks: Sequence[str], num_fewshot: int | None, seed: int) -> TaskDict:
    """The tasks with their data, and their settings as `lm_eval.simple_evaluate` sets them.

    That function itself is not called: it also runs `git` and `pip` at every
    call, to describe a machine that the ledger describes anyway.
    """
    try:
        loaded = manager.load(list(tasks))
    except OSError as error:  # a hub data set out of reach, a local file that is not there
        raise WorkError(f"cannot read the data of the tasks {', '.join(tasks)}: {error}") from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # a task that sets 0 means it
            task.set_config("num_fewshot", num_fewshot or 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED + seed)
    return loaded


def _metrics(task: str, values: dict[str, Any]) -> Iterator[Metric]:
    """Metrics of one task from lm-eval's `{"acc,none": ..., "acc_stderr,none": ..., "alias": ...}`."""
    for key, value in values.items():
        measure, _, filter_name = key.partition(",")
        if not filter_name or measure.endswith("_stderr") or measure == "bypass":
            continue
        if not isinstance(value, int | float):
            continue
        stderr = values.get(f"{measure}_stderr,{filter_name}")
        name = measure if filter_name == "none" else key
        yield Metric(f"{task}/{name}", float(value), stderr=stderr if isinstance(stderr, float) else None)


def _task_manager(tasks: tuple[str, ...], include_path: str | None) -> TaskManager:
    """A task manager that knows every one of `tasks`.

    Indexing the thousands of tasks of the harness takes seconds, so it is left
    out where our own tasks and those of `include_path` are all that is asked for.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise RequestError(f"the include_path of lm-eval tasks, {include_path!r}, is not a folder")
    manager = _index(include_path, include_defaults=False)
    if not _leaves(manager, tasks) <= set(manager.all_subtasks):
        manager = _index(include_path, include_defaults=True)
    index = manager.task_index
    for task in tasks:
        if task not in index:
            raise unknown_name("task", task, index)
        unsafe = [
            leaf for leaf in _leaves(manager, task) if leaf in index and index[leaf].cfg.get("unsafe_code")
        ]
        if unsafe:
            raise RequestError(
                f"task {task!r} executes code that the model wrote ({', '.join(sorted(unsafe))}), and not "
                "in a sandbox; give a task that only collects it (metric: bypass), see docs/probes.md"
            )
    return manager


def _leaves(manager: TaskManager, request: Any) -> set[str]:
    """Names of the single tasks that a name, or a group's list of them, stands for."""
    if isinstance(request, dict):  # a child that a group defines in place
        request = request.get("task", [])
    if isinstance(request, str) and request in manager.all_groups:
        request = manager.task_index[request].cfg["task"]
    elif isinstance(request, str) and request in manager.all_tags:
        request = manager.task_index[request].tags
    elif isinstance(request, str):
        return {request}
    children = [request] if isinstance(request, str) else request
    return {leaf for child in children for leaf in _leaves(manager, child)}


@cache
def _index(include_path: str | None, include_defaults: bool) -> TaskManager:
    paths = [str(TASKS), *([include_path] if include_path else [])]
    with _quiet():
        return TaskManager(include_path=paths, include_defaults=include_defaults)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines, prints and progress bars of lm-eval; errors are still raised.

    Also keeps its bootstrap in this process (same numbers): by default it forks
    a worker per core of the machine, which Ray and CUDA do not stand.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    pool_switch = os.environ.get("DISABLE_MULTIPROC", "")  # empty means the same to lm-eval as absent
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        os.environ["DISABLE_MULTIPROC"] = pool_switch
