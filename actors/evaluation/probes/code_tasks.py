"""Scores of generated code: its failure classes always, pass@1 where it may be run.

A problem is a row of HumanEval(+) or MBPP(+), as `code_failures.program_of` reads it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from actors.contracts import Metric
from actors.evaluation.probes.code_failures import CLASSES, classify, program_of
from actors.evaluation.sandbox.runner import pass_at_1

Problem = Mapping[str, Any]


def is_code_problem(document: object) -> bool:
    """Return true if a task's document is a problem that brings tests for the code that solves it."""
    return isinstance(document, Mapping) and (
        "test_list" in document or {"prompt", "entry_point", "test"} <= document.keys()
    )


def score_code(
    problems: Sequence[Problem],
    responses: Sequence[str],
    execute: bool,
    finished: Sequence[bool] | None = None,
) -> list[Metric]:
    """Return the share of responses in each of `CLASSES`, and `pass_at_1` if `execute`.

    `finished` marks responses that the model ended itself; all, if it is not given.

    Raises WorkError if the code is to be run and cannot be shut in.
    """
    completed = list(zip(problems, responses, finished or [True] * len(problems), strict=True))
    found: Counter[str] = Counter()
    for problem, response, ended in completed:
        # The code that a response continues is HumanEval's prompt; MBPP's is prose.
        before = problem["prompt"] if "entry_point" in problem else ""
        found[classify(response, before, ended)] += 1
    metrics = [Metric(name, found[name] / len(completed)) for name in CLASSES]
    if execute:
        metrics.append(pass_at_1([program_of(*each) for each in completed]))
    return metrics


def code_task_metrics(samples: Mapping[str, Sequence[Mapping[str, Any]]], execute: bool) -> list[Metric]:
    """Return `<task>/<measure>` of `score_code` for lm-eval's tasks whose documents are code problems.

    Args:
        samples: lm-eval's logged samples by task, with `doc` and `filtered_resps` each.
        execute: whether the code may be run.
    """
    metrics = []
    for task, logged in samples.items():
        if logged and is_code_problem(logged[0]["doc"]):
            problems = [sample["doc"] for sample in logged]
            responses = [_first(sample["filtered_resps"]) for sample in logged]
            scores = score_code(problems, responses, execute)
            metrics += [Metric(f"{task}/{m.name}", m.value, m.unit, m.stderr) for m in scores]
    return metrics


def _first(responses: Any) -> str:
    """Return the first of a document's samples, which filters may have wrapped once more."""
    return responses if isinstance(responses, str) else _first(responses[0])
