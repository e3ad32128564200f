"""Data of the page's interactive figure: every model one could take, with its size and its quality."""

from collections.abc import Sequence
from typing import Any

from orchestrator.reporting.charts.charts import short
from orchestrator.reporting.charts.figures import COLOURS, GREY
from orchestrator.reporting.charts.method_charts import LEAST_DEPTHS
from orchestrator.reporting.data.accuracies import MEAN_ACCURACY
from orchestrator.reporting.data.comparisons import NOT_PRUNED, Entry
from orchestrator.reporting.data.measured import DENSE, RECOVERED, direction, headline_metrics, is_speed
from orchestrator.reporting.data.provenance import anchor_of
from orchestrator.reporting.tables.metric_names import named

AXES = {"parameters": "parameters", "layers": "layers left"}


def describe(found: Sequence[Entry]) -> dict[str, Any] | None:
    """Return JSON-able data of the figure, None if there are no two sizes of pruned models to compare."""
    sized = [one for one in found if one.parameters and one.phase in (DENSE, RECOVERED)]
    pruned = [one for one in sized if one.phase != DENSE]
    metrics = headline_metrics(pruned)
    if not metrics or len({(one.model, one.layers) for one in pruned}) < LEAST_DEPTHS:
        return None
    metrics.sort(key=lambda name: name != MEAN_ACCURACY)
    return {
        "dense": NOT_PRUNED,
        "points": [
            {
                "model": one.model,
                "method": one.method,
                "seeds": one.seeds,
                "layers": one.layers,
                "parameters": one.parameters,
                "numbers": {
                    name: [short(number.value), short(number.stderr or 0.0), anchor_of(number.key)]
                    for name in metrics
                    if (number := one.numbers.get(name))
                },
            }
            for one in (*(one for one in sized if one.phase == DENSE), *pruned)
        ],
        "models": list(dict.fromkeys(one.model for one in sized)),
        "methods": list(dict.fromkeys(one.method for one in pruned)),
        "metrics": metrics,
        "names": {name: named(name) for name in metrics},
        "directions": {name: direction(name) for name in metrics},
        "axes": AXES | {name: named(name) for name in metrics if is_speed(name)},
        "colours": [GREY, *COLOURS],
    }
