"""How much memory a scoring takes at a time."""

from typing import Any

from actors.contracts import ScoreSpec


def memory_shares(spec: ScoreSpec) -> dict[str, Any]:
    """Return how a scoring that lacks memory is tried again; see `once_more_with_less`."""
    return {
        "size": 1.0,
        "smaller": 0.5,
        "what": f"scoring of {spec.model.source.path!r}",
        "setting": "scoring.memory_budget_gb",
        "remedy": "lower scoring.sequence_length, set scoring.stream_weights, or use a larger device",
    }
