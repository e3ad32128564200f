"""lm-eval's tasks: the harness's own, the user's, and those in `tasks/` beside this file."""

import contextlib
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from actors.artifacts import DRIVER_DIRECTORY
from actors.contracts import FewShot
from actors.errors import RequestError, unknown_name
from actors.evaluation.lm_eval.quiet import quiet

TASKS = Path(__file__).resolve().parent / "tasks"
"""Our own tasks; `lm_eval --include_path` of this folder runs them too."""


def check_tasks(tasks: Sequence[str], include_path: str | None = None, num_fewshot: FewShot = None) -> None:
    """Raise RequestError unless every name is a task, group or tag that may run.

    Refused are unknown names, also in `num_fewshot`, an `include_path` that is no
    folder, and tasks that execute generated code. No data are loaded.
    """
    if tasks:
        _shots(_task_manager(tuple(tasks), include_path), tuple(tasks), num_fewshot)


def check_task_data(
    tasks: Sequence[str], include_path: str | None = None, num_fewshot: FewShot = None
) -> None:
    """Raise RequestError unless the data of all tasks can be read; this process then keeps them."""
    if tasks:
        with quiet():
            load_tasks(tuple(tasks), include_path, num_fewshot)


@lru_cache(maxsize=1)
def load_tasks(tasks: tuple[str, ...], include_path: str | None, num_fewshot: FewShot) -> TaskDict:
    """Load the tasks with their data, kept for the next model, and with `num_fewshot` as requested.

    Settings are made as `lm_eval.simple_evaluate` makes them. That function
    itself is not called: it also runs `git` and `pip` at every call, to describe
    a machine that the ledger describes anyway.
    """
    manager = _task_manager(tasks, include_path)
    # Only the user's own tasks have data files, whose paths lm-eval takes as they stand.
    directory = os.environ.get(DRIVER_DIRECTORY, ".") if include_path else "."
    try:
        with contextlib.chdir(directory if os.path.isdir(directory) else "."):
            loaded = manager.load(list(tasks))
    except OSError as error:  # a hub data set out of reach, a local file that is not there
        raise RequestError(
            f"cannot read the data of the tasks {', '.join(tasks)}: {error}; download them first where "
            "machines are offline, or name tasks with data of your own by evaluation.include_path"
        ) from error
    shots = _shots(manager, tasks, num_fewshot)
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        single = name.rpartition("::")[2]  # a task that a group defines in place has the group's name before
        requested = num_fewshot if isinstance(num_fewshot, int) else shots.get(single)
        if own is None or (requested is not None and own != 0):  # a task that sets 0 means it
            task.set_config("num_fewshot", requested or 0)
    return loaded


def _shots(manager: TaskManager, tasks: tuple[str, ...], num_fewshot: FewShot) -> dict[str, int]:
    """Return the number of examples for each single task that is named; of two groups, the later one's."""
    known = {leaf for task in tasks for leaf in _leaves(manager, task)}
    shots: dict[str, int] = {}
    for name, number in num_fewshot if isinstance(num_fewshot, tuple) else ():
        if name not in manager.task_index or not (leaves := _leaves(manager, name)) <= known:
            raise RequestError(
                f"evaluation.num_fewshot names {name!r}, which is not among the tasks that are evaluated "
                f"({', '.join(tasks)}) or in a group of them"
            )
        shots |= dict.fromkeys(leaves, number)
    return shots


def _task_manager(tasks: tuple[str, ...], include_path: str | None) -> TaskManager:
    """Return a task manager whose index has every one of `tasks`.

    Indexing the thousands of tasks of the harness takes seconds, so it is left
    out where our own tasks and those of `include_path` are all that is requested.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise RequestError(f"the include_path of lm-eval tasks, {include_path!r}, is not a folder")
    manager = _task_index(include_path, include_defaults=False)
    if not _leaves(manager, tasks) <= set(manager.all_subtasks):
        manager = _task_index(include_path, include_defaults=True)
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
    """Return the names of the single tasks that a name, or a group's list of them, stands for."""
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
def _task_index(include_path: str | None, include_defaults: bool) -> TaskManager:
    paths = [str(TASKS), *([include_path] if include_path else [])]
    with quiet():
        return TaskManager(include_path=paths, include_defaults=include_defaults)


def task_names() -> list[str]:
    """Return the names of all tasks and groups of the installed lm-eval and of this project, ascending."""
    return sorted(_task_index(None, True).all_tasks)
