"""From what Ray reports of its nodes to the room that a campaign has there. Pure."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.scheduling.packing import Amounts, Node

SNAPSHOTS = 3
"""What others hold is the least of so many snapshots: in one, stages of our own may begin or end."""

ACCELERATOR = "accelerator_type:"
"""Ray's resource that names the type of a node's GPUs."""


@dataclass(frozen=True)
class NodeReport:
    """A node that is up, in Ray's words.

    Attributes:
        resources: what it has in all.
        available: what nobody holds.
        ours: what the processes of this campaign hold.
    """

    node_id: str
    name: str
    resources: Mapping[str, float]
    available: Mapping[str, float]
    ours: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


class Snapshots:
    """The last few reports of a cluster's nodes."""

    def __init__(self) -> None:
        self._others: deque[dict[str, Amounts]] = deque(maxlen=SNAPSHOTS)

    def add(self, reports: Sequence[NodeReport]) -> list[Node]:
        """Return the nodes of the newest report, with what others hold there."""
        others = {}
        for report in reports:
            have, free, ours = map(_amounts, (report.resources, report.available, report.ours))
            others[report.node_id] = (
                max(0.0, have[0] - free[0] - ours[0]),
                max(0.0, have[1] - free[1] - ours[1]),
                max(0.0, have[2] - free[2] - ours[2]),
            )
        self._others.append(others)
        return [node_of(report, self._least(report.node_id)) for report in reports]

    def _least(self, node_id: str) -> Amounts:
        seen = [others[node_id] for others in self._others if node_id in others]
        cpus, gpus, memory_bytes = (min(amounts) for amounts in zip(*seen, strict=True))
        return cpus, gpus, memory_bytes


def node_of(report: NodeReport, others: Amounts = (0.0, 0.0, 0.0)) -> Node:
    """Return the node of a report, of which others hold so much."""
    types = {name.removeprefix(ACCELERATOR) for name in report.resources if name.startswith(ACCELERATOR)}
    return Node(
        report.name,
        *_amounts(report.resources),
        others=others,
        ours=_amounts(report.ours),
        accelerators=frozenset(types),
        labels=report.labels,
    )


def _amounts(resources: Mapping[str, float]) -> Amounts:
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0), resources.get("memory", 0.0)
