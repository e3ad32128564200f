"""Admission: which of the stages that wait the cluster takes now.

A stage that the cluster has no room for waits here rather than in Ray, where it could not be overtaken.
Ray has the last word: what is admitted and finds no room after all waits there, and holds nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import ClusterTooSmallError, RequestError
from orchestrator.scheduling.packing import Node, Packing
from orchestrator.scheduling.resources import GB, ROUNDING, SECTIONS, ResourceRequest

REPEATED_KINDS = ("score", "recover", "evaluate")
"""The stages that a trajectory passes again and again."""


@dataclass(frozen=True)
class Candidate:
    """A stage that waits. If `keeps_room`, nothing behind it may take the room that it waits for."""

    kind: str
    keeps_room: bool = False


@dataclass(frozen=True)
class AdmissionController:
    """What nodes the cluster has by now, and what a stage of each kind requests; other kinds hold nothing.

    All stages together hold no more than `max_devices`.
    """

    nodes: Callable[[], Sequence[Node]]
    requests: Mapping[str, ResourceRequest]
    max_devices: float | None = None

    def admit(self, at_work: Iterable[str], queue: Sequence[Candidate]) -> list[str | None]:
        """Return why each stage of the queue has to wait, beside those at work; None if it does not.

        A stage that fits passes those before it that do not, unless they keep their room.
        What a pool holds beyond its first actor is what is left to it, up to its most.
        """
        nodes, requests = self.nodes(), self.requests
        packing, free_of_ours = Packing(nodes), Packing(nodes)
        on_gpus = any(request.bundle.gpus for request in requests.values())
        held = [requests[kind] for kind in at_work if kind in requests]
        found = [packing.take_held(each.bundle, each.max_count) for each in held]
        for each, taken in zip(held, found, strict=True):
            more = packing.take(each.bundle, each.max_count - taken, each.min_count - taken)
            if taken + more < each.min_count and free_of_ours.fits(each):
                packing.reserve(each)  # it waits in Ray, and nothing goes past it
        devices = sum(each.max.devices(on_gpus) for each in held)
        reasons: list[str | None] = []
        for waiting in queue:
            request = requests.get(waiting.kind)
            if request is None:
                reasons.append(None)
                continue
            wanted = request.max.devices(on_gpus)
            if self.max_devices is not None and devices + wanted > self.max_devices + ROUNDING and devices:
                reasons.append(f"{request}; the campaign holds {devices:g} of {self.max_devices:g} devices")
                continue
            # What no node is known to hold, an autoscaler may: Ray has to ask it for the node.
            unknown = not devices and not Packing(nodes, empty=True).fits(request)
            if not unknown and not packing.fits(request):
                reasons.append(packing.shown(request))
                if waiting.keeps_room and free_of_ours.fits(request):
                    packing.reserve(request)
                continue
            packing.take(request.bundle, request.max_count)
            devices += wanted
            reasons.append(None)
        return reasons

    def concurrent_trajectories(self, nodes: Sequence[Node]) -> int:
        """Return how many have to be under way for all devices to be held, whatever stage each is in."""
        held = [self.requests[kind] for kind in REPEATED_KINDS if kind in self.requests]
        on_gpus = any(request.bundle.gpus for request in held)
        whole = Packing(nodes, empty=True)
        counts = []
        for request in held:
            if request.bundle.gpus or not on_gpus:
                counts.append(whole.count(request.bundle) // request.max_count)
                if self.max_devices is not None:
                    counts[-1] = min(counts[-1], int(self.max_devices / request.max.devices(on_gpus)))
        return max(counts)


def check_speeds_compare(request: ResourceRequest, nodes: Sequence[Node]) -> None:
    """Refuse to measure speeds where evaluations may land on GPUs of more than one type.

    Raises:
        RequestError: names the types.
    """
    types = set().union(*(node.accelerators for node in nodes if node.suits(request.bundle)))
    if request.bundle.gpus and request.bundle.accelerator is None and len(types) > 1:
        raise RequestError(
            f"evaluation.throughput compares speeds, but evaluations may run on {', '.join(sorted(types))}; "
            "set execution.evaluation.accelerator to one of them"
        )


def check_resources(
    requests: Mapping[str, ResourceRequest], nodes: Sequence[Node], max_devices: float | None = None
) -> None:
    """Refuse what the cluster can never hold, rather than wait for it for ever.

    Raises:
        ClusterTooSmallError: says what is needed, and what there is.
    """
    on_gpus = any(request.bundle.gpus for request in requests.values())
    for kind, request in requests.items():
        section, count, whole = SECTIONS[kind], request.min_count, Packing(nodes, empty=True)
        least = request.min.devices(on_gpus)
        if max_devices is not None and least > max_devices + ROUNDING:
            raise ClusterTooSmallError(
                f"execution.{section} needs {least:g} devices, but execution.max_devices is {max_devices:g}; "
                f"raise it, or lower execution.{section}"
            )
        if whole.fits(request):
            continue
        bundle, suiting = request.bundle, [node for node in nodes if node.suits(request.bundle)]
        shown = (
            ("GPU", bundle.gpus, [node.gpus for node in suiting]),
            ("CPU", bundle.cpus, [node.cpus for node in suiting]),
            ("GB of memory", bundle.memory_bytes / GB, [node.memory_bytes / GB for node in suiting]),
        )
        lacking = [row for row in shown if row[1] * count > sum(row[2]) or row[1] > max(row[2], default=0.0)]
        unit, each, had = lacking[0] if lacking else shown[0 if bundle.gpus else 1]
        special = [bundle.accelerator or "", *(f"{name}={value}" for name, value in bundle.labels.items())]
        of_type = f" on nodes with {', '.join(filter(None, special))}" if any(special) else ""
        raise ClusterTooSmallError(
            f"execution.{section} needs {count * each:g} {unit} ({count} x {each:g}){of_type}, but the "
            f"cluster has {sum(had):g} {unit}, {max(had, default=0):g} on its largest node"
            f"{'' if lacking else f', where {whole.count(bundle)} x {each:g} fit'}; "
            f"lower execution.{section}, use a larger cluster, or say in "
            "execution.cluster_maximum what an autoscaler makes of this one"
        )
