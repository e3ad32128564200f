"""What others hold on a node, from reports in which stages of our own may be in transition."""

from typing import Any

from orchestrator.scheduling.snapshots import NodeReport, Snapshots


def report(free: float, ours: float, **more: Any) -> NodeReport:
    return NodeReport(
        "id", "host", {"CPU": 8.0, "memory": 64e9}, {"CPU": free, "memory": 64e9}, {"CPU": ours}, **more
    )


def test_what_is_used_and_not_ours_is_others() -> None:
    (node,) = Snapshots().add([report(free=3, ours=2)])
    assert (node.name, node.total, node.others, node.ours) == ("host", (8, 0, 64e9), (3, 0, 0), (2, 0, 0))


def test_a_stage_of_ours_that_begins_or_ends_is_not_taken_for_others() -> None:
    snapshots = Snapshots()
    used = [(8, 0), (4, 0), (4, 4), (8, 4), (8, 0)]  # begins in the second, ends in the fourth
    assert [snapshots.add([report(*each)])[0].others[0] for each in used] == [0, 0, 0, 0, 0]


def test_what_others_take_counts_after_a_few_snapshots() -> None:
    snapshots = Snapshots()
    assert [snapshots.add([report(free, 0)])[0].others[0] for free in (8, 4, 4, 4, 8)] == [0, 0, 0, 4, 0]


def test_a_node_that_is_new_has_a_history_of_its_own() -> None:
    snapshots = Snapshots()
    snapshots.add([])
    assert snapshots.add([report(2, 0)])[0].others[0] == 6


def test_types_and_labels_are_read() -> None:
    gpus = NodeReport(
        "id", "host", {"GPU": 2.0, "accelerator_type:A100": 1.0}, {"GPU": 2.0}, labels={"zone": "x"}
    )
    (node,) = Snapshots().add([gpus])
    assert (node.accelerators, node.labels, node.gpus) == ({"A100"}, {"zone": "x"}, 2)
