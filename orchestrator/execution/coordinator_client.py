"""How the processes of a campaign reach its coordinator.

Every actor and worker of a stage has this client, to ask whether the campaign is to stop, so nothing but Ray
is loaded here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from orchestrator.scheduling.coordinator import LeaseReply, LeaseRequest


class RayCoordinatorClient:
    """A `CoordinatorClient` of a coordinator that a Ray actor holds."""

    def __init__(self, actor: Any):
        self._actor = actor

    def try_acquire(self, request: "LeaseRequest", wait_s: float = 0.0) -> "LeaseReply":
        return ray.get(self._actor.try_acquire.remote(request, wait_s))

    def release(self, request: "LeaseRequest", seconds: float, failed: bool = False) -> None:
        ray.get(self._actor.release.remote(request, seconds, failed))

    def renew(self, held: Sequence["LeaseRequest"]) -> Sequence[str]:
        return ray.get(self._actor.renew.remote(held))

    def fail(self, trajectory: str) -> None:
        ray.get(self._actor.fail.remote(trajectory))

    def save_usage(self) -> None:
        """Have the coordinator write what has been used of the cluster."""
        ray.get(self._actor.save_usage.remote())

    def ended_by(self) -> str | None:
        return ray.get(self._actor.ended_by.remote())

    def stop(self, reason: str) -> None:
        ray.get(self._actor.stop.remote(reason))

    def stopping(self) -> bool:
        return ray.get(self._actor.stopping.remote())

    def is_cancelled(self, trajectory: str) -> bool:
        return ray.get(self._actor.is_cancelled.remote(trajectory))
