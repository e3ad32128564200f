"""The key of a stage: a hash of all that its result depends on, content by hash, never by place."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from actors import data
from actors.contracts import (
    ArtifactRef,
    EvaluationSpec,
    ExportSpec,
    ModelSpec,
    RecoverySpec,
    ScoreSpec,
    TextSpec,
    digest,
)
from actors.contracts.settings import AddedLater, InKeyAs, InKeyWhereUsed, NotInKey, marks, removed_fields
from actors.plugins import releases

STAGE_VERSION: Mapping[str, int] = {
    "score": 1,
    "prune": 1,
    "generate": 1,
    "teach": 1,
    "recover": 1,
    "evaluate": 1,
    "export": 3,
}
"""Raise a kind's number when its results change meaning: old ones are then computed anew."""

PRECISION = ("bf16", "fp16", "optimizer")
"""The fields of a DeepSpeed JSON that do change the result."""


def stage_key(kind: str, inputs: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of a stage's kind, its version, and all its result depends on."""
    return digest({"kind": kind, "version": STAGE_VERSION[kind], "inputs": inputs})


def key_inputs(spec: Any, fingerprints: Mapping[TextSpec | ModelSpec, str]) -> Any:
    """Return all that a spec's result depends on, as JSON values.

    Args:
        fingerprints: hashes of the contents of every model and text that the spec names.
    """
    if isinstance(spec, ModelSpec):
        return fingerprints[spec]
    if isinstance(spec, TextSpec):
        # Responses are unknown in a plan: they are generated while it runs.
        return data.describe_text(spec).fingerprint if spec.generated else fingerprints[spec]
    if isinstance(spec, ArtifactRef):
        return spec.sha256
    if is_dataclass(spec):
        named = dict(_fields_in_key(spec))
        if isinstance(spec, RecoverySpec):
            theirs = {k: v for k, v in json.loads(spec.deepspeed).items() if k in PRECISION}
            named["precision"] = [spec.precision, theirs]
            if spec.teacher_cache == "topk":
                named["teacher_top_k"] = spec.teacher_top_k
        named |= _computed_anew(spec)
        if plugged := releases(spec):
            named["plugins"] = plugged
        return {name: key_inputs(value, fingerprints) for name, value in named.items()}
    if isinstance(spec, (list, tuple)):
        return [key_inputs(value, fingerprints) for value in spec]
    return spec


def _fields_in_key(spec: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields that are in the key, by the names that they have there; see `contracts.settings`."""
    cls: Any = type(spec)
    for field in fields(spec):
        value, marked = getattr(spec, field.name), marks(cls, field.name)
        if {NotInKey(), InKeyWhereUsed()} & set(marked) or AddedLater(value) in marked:
            continue
        yield next((m.name for m in marked if isinstance(m, InKeyAs)), field.name), value
    yield from removed_fields(cls).items()


def _computed_anew(spec: Any) -> dict[str, str]:
    """Return what has come to be computed otherwise, for the specs alone whose results it changes."""
    changed: dict[str, str] = {}
    if isinstance(spec, RecoverySpec):
        if spec.takes_last_state_after_norm:
            changed["last_hidden_state"] = spec.loss.last_hidden_state
        return changed
    if not isinstance(spec, EvaluationSpec | ExportSpec | ScoreSpec):
        return changed
    rounded = spec.model.source.dtype != "float32"
    if rounded and spec.model.adapters:
        changed["adapters_summed_in"] = "float32"
    if rounded and (spec.tasks if isinstance(spec, EvaluationSpec) else getattr(spec, "task", None)):
        changed["softmax"] = "float32"
    if isinstance(spec, EvaluationSpec) and set(spec.probes) & {"degeneration", "code_failures"}:
        changed["decoding"] = "greedy"
    return changed
