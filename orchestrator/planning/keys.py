"""The key of a stage: a hash of all that its result depends on, content by hash, never by place."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from actors import data
from actors.contracts import (
    ArtifactRef,
    EvaluationSpec,
    ExportSpec,
    GenerationSpec,
    ModelSpec,
    RecoverySpec,
    ScoreSpec,
    TaskSpec,
    TextSpec,
    digest,
)
from actors.plugins import releases

STAGE_VERSION: Mapping[str, int] = {
    "score": 1,
    "prune": 1,
    "generate": 1,
    "recover": 1,
    "evaluate": 1,
    "export": 2,
}
"""Raise a kind's number when its results change meaning: old ones are then computed anew."""

NOT_IN_KEY = frozenset(
    {
        "micro_batch_size",
        "checkpoint_steps",
        "gradient_checkpointing",
        "deepspeed",
        "memory_budget_gb",
        "stream_weights",
        "tasks_fingerprint",
    }
)
"""Fields of a spec that change how its result is computed, but not the result, or that are in the key
under another name."""

ADDED_LATER: Mapping[str, Any] = {"apply_chat_template": False}
"""Fields that a spec got after results were stored, each with the value that means what was done
before: at that value they are not in the key, so that older results are found."""

PRECISION = ("bf16", "fp16", "optimizer")
"""The fields of a DeepSpeed JSON that do change the result."""


def stage_key(kind: str, inputs: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a stage's kind, its version, and all its result depends on."""
    return digest({"kind": kind, "version": STAGE_VERSION[kind], "inputs": inputs})


def key_inputs(
    spec: Any, fingerprints: Mapping[TextSpec | ModelSpec, str], tasks_fingerprint: str | None
) -> Any:
    """All that a spec's result depends on, as JSON values.

    Args:
        fingerprints: hashes of the contents of every model and text that the spec names.
        tasks_fingerprint: the hash of the folder of the user's own lm-eval tasks.
    """
    if isinstance(spec, ModelSpec):
        return fingerprints[spec]
    if isinstance(spec, TextSpec):
        # A plan cannot know responses: they are generated while it runs.
        return data.describe_text(spec).fingerprint if spec.generated else fingerprints[spec]
    if isinstance(spec, ArtifactRef):
        return spec.sha256
    if is_dataclass(spec):
        named = _named_inputs(spec, tasks_fingerprint)
        return {name: key_inputs(value, fingerprints, tasks_fingerprint) for name, value in named.items()}
    if isinstance(spec, (list, tuple)):
        return [key_inputs(value, fingerprints, tasks_fingerprint) for value in spec]
    return spec


def _named_inputs(spec: Any, tasks_fingerprint: str | None) -> dict[str, Any]:
    """The fields of a spec that its result depends on, and what else does."""
    named = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in NOT_IN_KEY}
    for name in ADDED_LATER.keys() & named.keys():
        if named[name] == ADDED_LATER[name]:
            del named[name]
    if isinstance(spec, EvaluationSpec | TaskSpec):
        named["include_path"] = tasks_fingerprint
    if isinstance(spec, EvaluationSpec | TaskSpec | GenerationSpec):
        del named["batch_size"]  # that of recovery does change its result
    if isinstance(spec, RecoverySpec):
        theirs = {k: v for k, v in json.loads(spec.deepspeed).items() if k in PRECISION}
        named["precision"] = [spec.precision, theirs]
    named |= _computed_anew(spec)
    if plugged := releases(spec):
        named["plugins"] = plugged
    return named


def _computed_anew(spec: Any) -> dict[str, str]:
    """What has come to be computed otherwise, for the specs alone whose results it changes."""
    changed: dict[str, str] = {}
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
