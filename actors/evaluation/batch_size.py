"""How much an evaluation computes at a time."""

from dataclasses import replace
from typing import Any

from actors.contracts import EvaluationSpec

BATCH_SIZE = 8
"""Perplexity windows, prompts and problems at a time where the spec gives no batch size."""


def batch_sizes(spec: EvaluationSpec) -> dict[str, Any]:
    """Return how an evaluation that lacks memory is tried again; see `once_more_with_less`."""
    half = (spec.batch_size or BATCH_SIZE) // 2
    return {
        "size": spec,
        "smaller": replace(spec, batch_size=half) if half else None,
        "what": f"evaluation of {spec.model.source.path!r}",
        "setting": "evaluation.batch_size",
        "remedy": "lower evaluation.max_length or the context of its texts, or use a device with more memory",
    }
