"""The table of trackers that a campaign can publish to; each imports its package when it is made."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orchestrator.config import CampaignConfig
from orchestrator.errors import RequestError
from orchestrator.storage.stage_store import Store
from orchestrator.tracking.mlflow import Mlflow
from orchestrator.tracking.publisher import Tracker
from orchestrator.tracking.tensorboard import TensorBoard
from orchestrator.tracking.wandb import Wandb


@dataclass(frozen=True)
class TrackerKind:
    """A tracker, the Python package it needs, and what to install for that."""

    make: Callable[[CampaignConfig, Store], Tracker]
    package: str
    install: str


TRACKERS: Mapping[str, TrackerKind] = {
    "tensorboard": TrackerKind(TensorBoard, "tensorboardX", "tensorboardX"),
    "mlflow": TrackerKind(Mlflow, "mlflow", "mlflow-skinny"),
    "wandb": TrackerKind(Wandb, "wandb", "wandb"),
}
"""Every tracker, by the field of `tracking` that switches it on."""


def make_trackers(config: CampaignConfig, store: Store) -> dict[str, Tracker]:
    """Return the trackers that the campaign configures; no server need answer yet.

    Raises:
        RequestError: a tracker's package is not installed, or lacks what it needs here.
    """
    trackers: dict[str, Tracker] = {}
    for name, kind in TRACKERS.items():
        if not getattr(config.tracking, name):
            continue
        if importlib.util.find_spec(kind.package) is None:
            raise RequestError(
                f"tracking.{name} needs the Python package {kind.package!r}, which is not installed: "
                f"pip install {kind.install}, or leave tracking.{name} out"
            )
        trackers[name] = kind.make(config, store)
    return trackers
