"""Data of the page's interactive figure: every model one could take, with its size and its quality."""

from collections.abc import Sequence
from typing import Any

from orchestrator.reporting.charts.charts import short
from orchestrator.reporting.charts.figures import COLOURS
from orchestrator.reporting.data.comparisons import NOT_PRUNED
from orchestrator.reporting.data.measured import DENSE, Measured, direction, headline_metrics
from orchestrator.reporting.data.provenance import anchor_of

AXES = {"parameters": "parameters", "layers": "layers left"}


def describe(models: Sequence[Measured]) -> dict[str, Any] | None:
    """Return JSON-able data of the figure, None if nothing with a direction was measured."""
    sized = [model for model in models if model.parameters]
    metrics = headline_metrics(sized)
    if not metrics:
        return None
    speeds = [name for name in metrics if name.endswith("per_second") or "speedup" in name]
    dense = {model.model: model for model in sized if model.phase == DENSE}
    pruned = [model for model in sized if model.phase != DENSE]
    points = [
        {
            "model": model.model,
            "method": NOT_PRUNED if model.phase == DENSE else model.method,
            "seed": model.seed,
            "layers": model.layers,
            "parameters": model.parameters,
            "numbers": {
                name: [short(model.numbers[name].value), anchor_of(model.numbers[name].key)]
                for name in metrics
                if name in model.numbers
            },
        }
        for model in (*dense.values(), *pruned)
    ]
    return {
        "dense": NOT_PRUNED,
        "points": points,
        "models": list(dict.fromkeys(model.model for model in sized)),
        "methods": list(dict.fromkeys(model.method for model in pruned)),
        "metrics": metrics,
        "directions": {name: direction(name) for name in metrics},
        "axes": AXES | {name: name for name in speeds},
        "colours": ["#8c8c8c", *COLOURS],
    }
