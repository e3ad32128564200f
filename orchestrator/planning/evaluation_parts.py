"""An evaluation in parts: what was measured before the campaign asked for more is not measured again."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from actors.contracts import EvaluationSpec, PerplexitySpec
from actors.evaluation import suite_tasks

TASK_SETTINGS = (
    "limit",
    "max_length",
    "apply_chat_template",
    "system_instruction",
    "allow_code_execution",
    "task_suffix",
    "tasks_fingerprint",
    "seed",
)
PROBE_SETTINGS = ("limit", "max_new_tokens", "num_assistant_tokens", "allow_code_execution", "seed")
"""Settings that the numbers of tasks, and of probes, depend on."""


def evaluation_parts(
    spec: EvaluationSpec, former: Sequence[EvaluationSpec], is_stored: Callable[[EvaluationSpec], bool]
) -> list[EvaluationSpec]:
    """Return evaluations that together measure what `spec` asks for, as many of them stored as can be.

    At most the last is not stored: it measures what the others do not.

    Args:
        former: what earlier forms of the campaign asked for, the newest last.
    """
    if not former:
        return [spec]
    stored: list[EvaluationSpec] = []
    parts: list[EvaluationSpec] = []
    # What a later form asked for may have been measured in parts itself, by what the earlier ones left.
    for form in (*former, spec):
        parts = [form] if is_stored(form) else _cover(form, stored)
        stored += filter(is_stored, parts)
    return parts


def _cover(spec: EvaluationSpec, stored: Sequence[EvaluationSpec]) -> list[EvaluationSpec]:
    parts, rest = [], spec
    for part in reversed(stored):
        if (left := _without(rest, part)) != rest:
            parts.append(part)
            rest = left
    return [*parts, rest] if not parts or _measures_anything(rest) else parts


def _without(spec: EvaluationSpec, part: EvaluationSpec) -> EvaluationSpec:
    """Return what of `spec` is not measured by `part`, with the same numbers as its result."""
    measured = [_identity(text) for text in part.perplexity]
    tasks, suites, probes = spec.tasks, spec.suites, spec.probes
    if _agree(spec, part, TASK_SETTINGS) and _same_shots(spec, part):
        suites = tuple(suite for suite in suites if suite not in part.suites)
        # The mean of a suite is taken where all of its members are measured.
        whole = suite_tasks(suites, spec.task_suffix)
        tasks = tuple(task for task in tasks if task in whole or task not in part.tasks)
    if _agree(spec, part, PROBE_SETTINGS):
        probes = tuple(probe for probe in probes if probe not in part.probes)
    return replace(
        spec,
        perplexity=tuple(text for text in spec.perplexity if _identity(text) not in measured),
        tasks=tasks,
        suites=suites,
        probes=probes,
        throughput=None if spec.throughput == part.throughput else spec.throughput,
    )


def _identity(text: PerplexitySpec) -> tuple[Any, ...]:
    return (text.name, text.context, text.max_tokens, text.data, text.data.fingerprint)


def _agree(spec: EvaluationSpec, part: EvaluationSpec, names: Sequence[str]) -> bool:
    return all(getattr(spec, name) == getattr(part, name) for name in names)


def _same_shots(spec: EvaluationSpec, part: EvaluationSpec) -> bool:
    """Return whether the tasks of `part` have the same few-shot examples in `spec`."""
    now, before = spec.num_fewshot, part.num_fewshot
    if isinstance(now, tuple) and not isinstance(before, int):
        more = set(spec.tasks) - set(part.tasks)
        now = tuple(pair for pair in now if pair[0] not in more or pair in (before or ()))
        return dict(now) == dict(before or ())
    return now == before


def _measures_anything(spec: EvaluationSpec) -> bool:
    return bool(spec.perplexity or spec.tasks or spec.suites or spec.probes or spec.throughput)
