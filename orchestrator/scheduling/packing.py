"""Where bundles fit: nodes, and what is free on each. Pure.

A sum over nodes says nothing: three GPUs are free on two nodes, and no actor that holds two may fit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.scheduling.resources import ROUNDING, ResourceBundle, ResourceRequest

Amounts = tuple[float, float, float]
"""CPUs, GPUs, bytes of memory."""


@dataclass(frozen=True)
class Node:
    """A node that is up, or that an autoscaler may start.

    Attributes:
        cpus, gpus, memory_bytes: what it has in all.
        others: what of that is held by others than this campaign.
        ours: what of it processes of this campaign hold, as Ray last reported.
        accelerators: the types of its GPUs.
        is_up: false if an autoscaler would have to start it.
    """

    name: str
    cpus: float = 0.0
    gpus: float = 0.0
    memory_bytes: float = float("inf")
    others: Amounts = (0.0, 0.0, 0.0)
    ours: Amounts = (0.0, 0.0, 0.0)
    accelerators: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    is_up: bool = True

    @property
    def total(self) -> Amounts:
        """The amounts that it has in all."""
        return self.cpus, self.gpus, self.memory_bytes

    def devices(self, on_gpus: bool) -> float:
        """Return its GPUs, or its CPUs where no node has GPUs, that others do not hold."""
        return max(0.0, self.gpus - self.others[1] if on_gpus else self.cpus - self.others[0])

    def suits(self, bundle: ResourceBundle) -> bool:
        """Return whether it is of the type that the bundle asks for."""
        if bundle.accelerator is not None and bundle.accelerator not in self.accelerators:
            return False
        return all(self.labels.get(name) == value for name, value in bundle.labels.items())


class Packing:
    """Free amounts of nodes, from which bundles are taken, each of one node.

    Bundles go to the node where the least is left over: wide requests find whole nodes.
    """

    def __init__(self, nodes: Sequence[Node], empty: bool = False):
        """Begin with what others leave free; with all that the nodes have if `empty`."""
        self._nodes = nodes
        self._free = [
            list(node.total)
            if empty
            else [max(0.0, have - gone) for have, gone in zip(node.total, node.others, strict=True)]
            for node in nodes
        ]
        self._ours = [list(node.ours) for node in nodes]

    def copy(self) -> "Packing":
        """Return one that can be taken from without a change of this one."""
        new = Packing(())
        new._nodes = self._nodes
        new._free, new._ours = [[*free] for free in self._free], [[*ours] for ours in self._ours]
        return new

    def take_held(self, bundle: ResourceBundle, count: int) -> int:
        """Take up to `count` bundles where this campaign's processes are; return how many were found."""
        taken = 0
        for position, node in enumerate(self._nodes):
            while taken < count and node.suits(bundle) and _holds(self._ours[position], bundle):
                _subtract(self._ours[position], bundle)
                _subtract(self._free[position], bundle)
                taken += 1
        return taken

    def take(self, bundle: ResourceBundle, count: int, at_least: int = 0) -> int:
        """Take up to `count` bundles, nothing if fewer than `at_least` fit; return how many."""
        if not any(_amounts(bundle)):
            return count
        before, taken = [[*free] for free in self._free], 0
        while taken < count:
            fitting = [
                (self._left(position), position)
                for position, node in enumerate(self._nodes)
                if node.suits(bundle) and _holds(self._free[position], bundle)
            ]
            if not fitting:
                break
            _subtract(self._free[min(fitting)[1]], bundle)
            taken += 1
        if taken < at_least:
            self._free = before
            return 0
        return taken

    def fits(self, request: ResourceRequest) -> bool:
        """Return whether what the request needs to begin is free."""
        return self.copy().take(request.bundle, request.min_count, request.min_count) > 0

    def reserve(self, request: ResourceRequest) -> None:
        """Keep the nodes where the request will soonest find its place from all that is taken later."""
        by_free = sorted(range(len(self._nodes)), key=self._left, reverse=True)
        left = request.min_count
        for position in by_free:
            node, whole = self._nodes[position], Packing([self._nodes[position]])
            room = whole.take(request.bundle, left) if node.suits(request.bundle) else 0
            for _ in range(room):
                _subtract(self._free[position], request.bundle)
            left -= room
            if not left:
                return

    def count(self, bundle: ResourceBundle) -> int:
        """Return how many bundles are free; a million if it holds nothing."""
        if not any(_amounts(bundle)):
            return 1_000_000
        counts = [0]
        for node, free in zip(self._nodes, self._free, strict=True):
            if node.suits(bundle):
                shares = [have / need for have, need in zip(free, _amounts(bundle), strict=True) if need]
                counts.append(max(0, int(min(shares) + ROUNDING)))
        return sum(counts)

    def shown(self, request: ResourceRequest) -> str:
        """Return what of the request's bundles there is: "2 GPU on one node; free are 1 of 8 on 2 nodes"."""
        amount = 1 if request.bundle.gpus else 0
        unit = ("CPU", "GPU")[amount]
        suiting = [i for i, node in enumerate(self._nodes) if node.suits(request.bundle)]
        free = sum(max(0.0, self._free[position][amount]) for position in suiting)
        total = sum(self._nodes[position].total[amount] for position in suiting)
        nodes = f"{len(suiting)} node" + "s" * (len(suiting) != 1)
        return f"{request}; free are {free:g} of {total:g} {unit} on {nodes}"

    def _left(self, position: int) -> tuple[float, float, float]:
        """Order nodes by what is free: GPUs first; a node that is up before one that has to start."""
        cpus, gpus, _ = self._free[position]
        return (not self._nodes[position].is_up, gpus, cpus)


def _amounts(bundle: ResourceBundle) -> Amounts:
    return bundle.cpus, bundle.gpus, bundle.memory_bytes


def _holds(free: Sequence[float], bundle: ResourceBundle) -> bool:
    return all(need <= have + ROUNDING for have, need in zip(free, _amounts(bundle), strict=True))


def _subtract(free: list[float], bundle: ResourceBundle) -> None:
    for position, amount in enumerate(_amounts(bundle)):
        free[position] -= amount


def with_node_types(nodes: Sequence[Node], types: Sequence[tuple[Node, int]]) -> list[Node]:
    """Return the nodes with those that an autoscaler may still start, of so many of each type.

    Every node that is up counts as one of the type that it is most like; a small head as none.
    """
    kinds = [node_type for node_type, _ in types]
    left = [count for _, count in types]
    for node in nodes:
        like = [
            (abs(kind.gpus - node.gpus), abs(kind.cpus - node.cpus), position)
            for position, kind in enumerate(kinds)
            if left[position]
            and kind.accelerators <= node.accelerators
            and (kind.gpus > 0) == (node.gpus > 0)
            and node.cpus >= kind.cpus / 2
        ]
        if like:
            left[min(like)[-1]] -= 1
    more = [
        replace(kind, name=f"{kind.name} {number}")
        for kind, count in zip(kinds, left, strict=True)
        for number in range(count)
    ]
    return [*nodes, *more]
