"""Where bundles fit on nodes, and what is admitted: judged a node at a time, beside what others hold."""

import pytest

from orchestrator.errors import ClusterTooSmallError, RequestError
from orchestrator.scheduling.admission import (
    AdmissionController,
    Candidate,
    check_resources,
    check_speeds_compare,
)
from orchestrator.scheduling.packing import Node, Packing, with_node_types
from orchestrator.scheduling.resources import ResourceBundle, ResourceRequest

GPU = ResourceBundle(1, 1)


def nodes(*gpus: float, others: float = 0.0) -> list[Node]:
    """Nodes with so many GPUs each, of which others hold `others`."""
    return [Node(f"n{i}", 64, count, others=(0, others, 0)) for i, count in enumerate(gpus)]


def gang(gpus: float, count: int = 1) -> ResourceRequest:
    return ResourceRequest(ResourceBundle(1, gpus), count, count)


def admitted(
    have: list[Node], at_work: list[str], queue: list[str], **requests: ResourceRequest
) -> list[bool]:
    controller = AdmissionController(lambda: have, requests)
    return [reason is None for reason in controller.admit(at_work, [Candidate(kind) for kind in queue])]


@pytest.mark.parametrize(
    ("have", "asked", "expected"),
    [
        ((4, 4), (3, 3, 2), [True, True, False]),  # eight GPUs in all, but not two on a node
        ((4, 4), (2, 2, 2, 2), [True] * 4),
        ((4, 4), (3, 1, 3, 1), [True] * 4),
        ((4, 4), (1, 1, 4), [True, True, True]),  # small ones share a node
        ((1, 1, 1, 1), (2,), [True]),  # no known node holds it: an autoscaler may
        ((8,), (5, 5, 3), [True, False, True]),  # a small one passes a wide one that does not fit
    ],
)
def test_stages_are_packed_a_node_at_a_time(
    have: tuple[float, ...], asked: tuple[float, ...], expected: list[bool]
) -> None:
    requests = {f"{gpus} GPUs": gang(gpus) for gpus in asked}
    assert admitted(nodes(*have), [], [f"{gpus} GPUs" for gpus in asked], **requests) == expected


def test_a_gang_may_be_spread_over_nodes() -> None:
    assert admitted(nodes(4, 4), [], ["a"], a=gang(2, 4)) == [True]
    assert admitted(nodes(3, 3, 3), ["b"], ["a"], a=gang(2, 3), b=gang(1)) == [True]
    assert admitted(nodes(3, 3), [], ["a"], a=gang(2, 3)) == [True]  # no known nodes hold it: for Ray
    assert admitted(nodes(2, 2), ["b"], ["a"], a=gang(2, 2), b=gang(1)) == [False]


def test_what_others_hold_is_not_there() -> None:
    request = {"a": gang(2)}
    assert admitted(nodes(4, others=2), [], ["a", "a"], **request) == [True, False]
    assert admitted(nodes(4, others=3), [], ["a"], **request) == [False]
    controller = AdmissionController(lambda: nodes(4, others=3), request)
    assert controller.admit([], [Candidate("a")]) == ["2 GPU on one node; free are 1 of 4 GPU on 1 node"]


def test_stages_at_work_are_where_their_processes_are() -> None:
    one, two = Node("n0", 64, 4, ours=(1, 2, 0)), Node("n1", 64, 4, ours=(1, 2, 0))
    assert admitted([one, two], ["a", "a"], ["b"], a=gang(2), b=gang(3)) == [False]
    assert admitted(nodes(4, 4), ["a", "a"], ["b"], a=gang(2), b=gang(3)) == [True]


def test_a_pool_holds_what_is_left_to_it() -> None:
    requests = {"pool": ResourceRequest(GPU, 1, 8), "small": gang(1)}
    assert admitted(nodes(2, 2), [], ["pool", "small"], **requests) == [True, False]
    assert admitted(nodes(8, 2), ["pool"], ["small"], **requests) == [True]


def test_a_stage_that_others_have_passed_for_long_keeps_its_room() -> None:
    requests = {"wide": gang(4), "small": gang(1)}
    have = [Node("n0", 64, 4, ours=(1, 1, 0)), Node("n1", 64, 2, ours=(1, 1, 0))]
    controller = AdmissionController(lambda: have, requests)
    queue = [Candidate("wide"), *[Candidate("small")] * 3]
    assert [reason is None for reason in controller.admit(["small"] * 2, queue)] == [False, True, True, True]
    queue[0] = Candidate("wide", keeps_room=True)
    # On the node of two GPUs they still go past it; the first node is kept.
    assert [r is None for r in controller.admit(["small"] * 2, queue)] == [False, True, False, False]


def test_room_is_kept_for_nothing_that_others_leave_no_room_for() -> None:
    requests = {"wide": gang(4), "small": gang(1)}
    controller = AdmissionController(lambda: nodes(4, others=1), requests)
    queue = [Candidate("wide", keeps_room=True), Candidate("small")]
    assert [reason is None for reason in controller.admit([], queue)] == [False, True]


def test_a_quota_of_devices_is_kept() -> None:
    requests = {"recover": gang(2), "export": ResourceRequest(ResourceBundle(1))}
    controller = AdmissionController(lambda: nodes(8), requests, max_devices=5)
    queue = [Candidate(kind) for kind in ("recover", "recover", "recover", "export")]
    assert controller.admit([], queue) == [
        None, None, "2 GPU on one node; the campaign holds 4 of 5 devices", None,
    ]  # fmt: skip
    assert controller.concurrent_trajectories(nodes(8)) == 2


def test_types_labels_and_memory_decide_where_a_stage_fits() -> None:
    have = [
        Node("a", 8, 4, 100e9, accelerators=frozenset({"A100"})),
        Node("b", 8, 4, 10e9, accelerators=frozenset({"L4"}), labels={"zone": "x"}),
    ]
    fits = {
        "A100": ResourceBundle(1, 4, accelerator="A100"),
        "H100": ResourceBundle(1, 1, accelerator="H100"),
        "zone": ResourceBundle(1, 1, labels={"zone": "x"}),
        "memory": ResourceBundle(1, 0, 50e9),
        "both": ResourceBundle(1, 1, 50e9, labels={"zone": "x"}),
    }
    assert {name: Packing(have).fits(ResourceRequest(bundle)) for name, bundle in fits.items()} == {
        "A100": True, "H100": False, "zone": True, "memory": True, "both": False,
    }  # fmt: skip


def test_an_autoscaler_adds_what_is_not_up_yet() -> None:
    types = [(Node("gpu", 8, 4, is_up=False), 2), (Node("cpu", 16, is_up=False), 1)]
    up = [Node("head", 0), Node("w", 8, 4)]
    assert [node.name for node in with_node_types(up, types)] == ["head", "w", "gpu 0", "cpu 0"]
    assert [node.name for node in with_node_types([Node("w", 8, 4)], types)] == ["w", "gpu 0", "cpu 0"]
    # What is up is used first.
    packing = Packing(with_node_types([Node("w", 8, 4)], types))
    assert packing.take(ResourceBundle(1, 2), 2) == 2
    assert packing._free[0][1] == 0


@pytest.mark.parametrize(
    ("have", "request_", "message"),
    [
        ((4, 4), gang(5), r"execution.training needs 5 GPU \(1 x 5\), but .* 8 GPU, 4 on its largest node"),
        ((4, 4), gang(3, 3), r"needs 9 GPU \(3 x 3\), but the cluster has 8 GPU"),
        ((5, 5), gang(3, 3), r"needs 9 GPU \(3 x 3\).* has 10 GPU, 5 on its largest node, where 2 x 3 fit"),
    ],
)
def test_what_no_nodes_can_ever_hold_is_refused(
    have: tuple[float, ...], request_: ResourceRequest, message: str
) -> None:
    with pytest.raises(ClusterTooSmallError, match=message):
        check_resources({"recover": request_}, nodes(*have))
    check_resources({"recover": gang(4, 2)}, nodes(4, 4))


def test_speeds_are_measured_on_one_type_of_gpu() -> None:
    types = [Node(name, 8, 4, accelerators=frozenset({name})) for name in ("A100", "H100")]
    anywhere = ResourceRequest(GPU)
    with pytest.raises(RequestError, match=r"may run on A100, H100; set execution.evaluation.accelerator"):
        check_speeds_compare(anywhere, types)
    for nodes_, request in (
        (types[:1], anywhere),
        (types, ResourceRequest(ResourceBundle(1))),
        (types, ResourceRequest(ResourceBundle(1, 1, accelerator="A100"))),
    ):
        check_speeds_compare(request, nodes_)


def test_a_quota_below_what_a_stage_needs_is_refused() -> None:
    with pytest.raises(ClusterTooSmallError, match=r"needs 8 devices, but execution.max_devices is 4"):
        check_resources({"recover": gang(4, 2)}, nodes(4, 4), max_devices=4)
