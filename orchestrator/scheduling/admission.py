"""Admission: how many stages the cluster takes at a time.

A stage that the cluster has no resources for waits here rather than in Ray, where a request would run
into its time-out and could not be overtaken.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from orchestrator.scheduling.resources import ResourceBundle, ResourceRequest

REPEATED_KINDS = ("score", "recover", "evaluate")
"""The stages that a trajectory passes again and again."""


@dataclass(frozen=True)
class AdmissionController:
    """What the cluster has by now, and what a stage of each kind requests; other kinds hold nothing."""

    capacity: Callable[[], ResourceBundle]
    requests: Mapping[str, ResourceRequest]

    def can_admit(self, kinds: Iterable[str]) -> bool:
        """Return whether stages of these kinds can be at work together, begun in this order.

        The first always can: what the cluster can never give is refused before anything starts.
        A pool takes all that is left, up to what it holds at most.
        """
        requests, left = [self.requests[kind] for kind in kinds if kind in self.requests], self.capacity()
        for position, request in enumerate(requests):
            if position and not left.holds(request.min):
                return False
            left = left.without(request.max)
        return True

    def concurrent_trajectories(self) -> int:
        """Return how many have to be under way for all devices to be held, whatever stage each is in."""
        held = [self.requests[kind].max for kind in REPEATED_KINDS if kind in self.requests]
        on_gpus = any(bundle.gpus for bundle in held)
        capacity = self.capacity()
        return max(capacity.count(bundle) for bundle in held if bundle.gpus or not on_gpus)
