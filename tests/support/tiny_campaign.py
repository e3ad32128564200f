"""A campaign on a tiny model that runs in seconds, in the test's own process."""

from pathlib import Path
from typing import Any

import yaml

from orchestrator.execution.dry_run import planned_stages
from orchestrator.execution.progress import Report
from orchestrator.execution.resolvers import ComputeResolver
from orchestrator.execution.stage_kinds import Backend
from orchestrator.planning.plan import TrajectoryPlan
from orchestrator.scheduling.coordinator import Coordinator
from orchestrator.scheduling.leases import Leases
from orchestrator.scheduling.limits import Limits
from orchestrator.storage.stage_store import Store
from tests.support.tiny_models import save_tiny

_TEXT = "The quick brown fox jumps over the lazy dog . Stability of the higher layer is greater . "
NUM_LAYERS = 4


def tiny_campaign(directory: Path) -> dict[str, Any]:
    """A campaign of two iterations, 4 → 3 → 2 layers; model and text are written to `directory`."""
    model = save_tiny(directory / "model", num_layers=NUM_LAYERS)
    text = directory / "text.txt"
    text.write_text("\n".join(f"{i} {_TEXT}" for i in range(60)))
    return {
        "name": "tiny",
        "models": [{"id": "llama", "path": model}],
        "methods": [
            {
                "name": "iterabre",
                "scoring": {"calibration": {"path": str(text)}, "max_sequences": 4, "sequence_length": 32},
                "recovery": {
                    "data": {"path": str(text)},
                    "adapter": {"rank": 4},
                    "sequence_length": 16,
                    "batch_size": 2,
                    "micro_batch_size": 1,
                    "max_tokens": 96,
                    "learning_rate": 0.001,
                },
            }
        ],
        "targets": [{"layers": 3}, {"layers": 2}],
        "evaluation": {
            "perplexity": [{"name": "fox", "data": {"path": str(text)}, "context": 32, "max_tokens": 256}]
        },
        "execution": {"backend": "local"},
        "storage": {"path": str(directory / "runs")},
    }


def write_campaign(campaign: dict[str, Any], file: Path) -> str:
    """Write the campaign as YAML and return its path."""
    file.write_text(yaml.safe_dump(campaign, sort_keys=False))
    return str(file)


def resolver_of_one(
    plan: TrajectoryPlan, store: Store, backend: Backend, report: Report = lambda _progress: None
) -> ComputeResolver:
    """Return the resolver of a trajectory that is alone."""
    total = len(planned_stages(plan))
    return ComputeResolver(plan, store, backend, report, Leases(Coordinator(Limits())), total)
