"""How far a campaign is as a whole, and how long the rest of it is expected to take."""

from dataclasses import replace

import pytest

from orchestrator.planning.stages import PlannedStage
from orchestrator.reporting.data.overview import overview
from orchestrator.storage.run_progress import TrajectoryProgress

NOW = 1000.0
KINDS = ("evaluate", "score", "prune", "recover", "evaluate", "export")


def _stages(name: str, finished: int = 0) -> list[PlannedStage]:
    """Return the stages of one iteration; the first evaluation is that of all trajectories."""
    return [
        PlannedStage(kind, "dense" if number == 0 else f"{name}{number}", 1, 9, None, number < finished)
        for number, kind in enumerate(KINDS)
    ]


ALIKE: dict[tuple[str, str], float] = {}
"""Of no stage is it known what the plan expects of it."""

PLANNED = {"a": _stages("a"), "b": _stages("b")}
A = TrajectoryProgress(
    "a", 1, 1, "recover", 30, 100, key="a3", started_at=NOW - 30,
    kinds_done={"evaluate": 1, "score": 1, "prune": 1}, seconds_of={"evaluate": 60.0, "score": 40.0},
)  # fmt: skip


def test_what_trajectories_share_counts_once() -> None:
    # Of a: three are done. Of b: its dense evaluation, which is a's.
    found = overview(PLANNED, ALIKE, NOW - 130, [A], NOW)
    assert (found.stages_done, found.stages_total, found.started_at) == (3, 11, NOW - 130)


def test_the_rest_takes_as_long_as_the_like_took() -> None:
    # recover: 30 of 100 in 30 s; evaluate 60 s, score 40 s; no export is finished yet.
    # a: 70 s of recover, evaluate 60; b: score 40, recover 100, evaluate 60. One at a time.
    found = overview(PLANNED, ALIKE, NOW - 130, [A], NOW)
    assert found.left_s == pytest.approx(70 + 60 + 40 + 100 + 60)
    # Two at work, b at 10 s of its scoring: half of the work each, but b's chain is no shorter.
    b = TrajectoryProgress("b", 1, 1, "score", key="b1", started_at=NOW - 10)
    assert overview(PLANNED, ALIKE, NOW - 130, [A, b], NOW).left_s == pytest.approx((330 - 10) / 2)
    long = {**PLANNED, "b": [*_stages("b"), *_stages("c")[1:]]}
    chain = 40 + 100 + 40 + 100 - 10
    assert overview(long, ALIKE, NOW - 130, [A, b], NOW).left_s == pytest.approx(max((320 + 200) / 2, chain))


def test_larger_stages_take_as_much_longer_as_the_plan_expects() -> None:
    # What is finished took 4 times what was expected: evaluate 60 s of 15, score 40 of 10.
    expected = {("evaluate", "dense"): 15.0, ("score", "a1"): 10.0, ("score", "b1"): 20.0}
    expected |= {
        ("evaluate", "a4"): 5.0,
        ("evaluate", "b4"): 30.0,
        ("recover", "a3"): 50.0,
        ("recover", "b3"): 8.0,
    }
    # Of a: 70 s of recover, evaluate 20. Of b: score 80, evaluate 120; recover 100 s · 8 / 50.
    found = overview(PLANNED, expected, NOW - 130, [A], NOW)
    assert found.left_s == pytest.approx(70 + 20 + 80 + 120 + 16)


def test_a_stage_at_work_tells_more_of_itself_than_finished_ones_do() -> None:
    # A short recovery is finished; this one has 30 of 100 steps after 30 s. The other takes 5 s as well.
    further = replace(
        A, kinds_done={**A.kinds_done, "recover": 1}, seconds_of={**A.seconds_of, "recover": 5.0}
    )
    start = PlannedStage("recover", "start", 1, 9, None, True)
    planned = {"a": [*PLANNED["a"][:3], start, *PLANNED["a"][3:]], "b": PLANNED["b"]}
    found = overview(planned, ALIKE, NOW - 130, [further], NOW)
    assert found.left_s == pytest.approx(70 + 60 + 40 + 5 + 60)


def test_neither_the_start_of_processes_nor_what_an_earlier_try_has_done_counts_as_pace() -> None:
    # 20 s of start; then 10 of the 60 steps that were left, in 10 s.
    resumed = replace(A, done=50, counted_from=40, counted_since=NOW - 10)
    found = overview({"a": PLANNED["a"]}, ALIKE, NOW - 130, [resumed], NOW)
    assert found.left_s == pytest.approx(50 + 60)
    few = replace(resumed, done=42)
    assert overview({"a": PLANNED["a"]}, ALIKE, NOW - 130, [few], NOW).unknown == "recover"


def test_what_is_not_known_is_named() -> None:
    early = replace(A, done=2)  # 2 of 100 steps tell nothing
    found = overview(PLANNED, ALIKE, NOW, [early], NOW)
    assert (found.left_s, found.unknown) == (None, "recover")
    assert overview(PLANNED, ALIKE, NOW, [], NOW).unknown == "evaluate"


def test_what_has_ended_or_was_finished_before_is_not_left() -> None:
    failed = replace(A, stage="failed", key="", finished=True)
    b = TrajectoryProgress("b", 1, 1, "score", key="b1", started_at=NOW, kinds_done={"evaluate": 1})
    resumed = {"a": _stages("a"), "b": _stages("b", finished=5)}
    found = overview(resumed, ALIKE, NOW, [failed, b], NOW)
    assert (found.stages_done, found.left_s) == (3 + 4, 0.0)
