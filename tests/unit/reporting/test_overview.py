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


PLANNED = {"a": _stages("a"), "b": _stages("b")}
A = TrajectoryProgress(
    "a", 1, 1, "recover", 30, 100, key="a3", started_at=NOW - 30,
    kinds_done={"evaluate": 1, "score": 1, "prune": 1}, seconds_of={"evaluate": 60.0, "score": 40.0},
)  # fmt: skip


def test_what_trajectories_share_counts_once() -> None:
    # Of a: three are done. Of b: its dense evaluation, which is a's.
    found = overview(PLANNED, NOW - 130, [A], NOW)
    assert (found.stages_done, found.stages_total, found.started_at) == (3, 11, NOW - 130)


def test_the_rest_takes_as_long_as_the_like_took() -> None:
    # recover: 30 of 100 in 30 s; evaluate 60 s, score 40 s; no export is finished yet.
    # a: 70 s of recover, evaluate 60; b: score 40, recover 100, evaluate 60. One at a time.
    found = overview(PLANNED, NOW - 130, [A], NOW)
    assert found.left_s == pytest.approx(70 + 60 + 40 + 100 + 60)
    # Two at work, b at 10 s of its scoring: half of the work each, but b's chain is no shorter.
    b = TrajectoryProgress("b", 1, 1, "score", key="b1", started_at=NOW - 10)
    assert overview(PLANNED, NOW - 130, [A, b], NOW).left_s == pytest.approx((330 - 10) / 2)
    long = {**PLANNED, "b": [*_stages("b"), *_stages("c")[1:]]}
    chain = 40 + 100 + 40 + 100 - 10
    assert overview(long, NOW - 130, [A, b], NOW).left_s == pytest.approx(max((320 + 200) / 2, chain))


def test_what_is_not_known_is_named() -> None:
    early = replace(A, done=2)  # 2 of 100 steps tell nothing
    found = overview(PLANNED, NOW, [early], NOW)
    assert (found.left_s, found.unknown) == (None, "recover")
    assert overview(PLANNED, NOW, [], NOW).unknown == "evaluate"


def test_what_has_ended_or_was_finished_before_is_not_left() -> None:
    failed = replace(A, stage="failed", key="", finished=True)
    b = TrajectoryProgress("b", 1, 1, "score", key="b1", started_at=NOW, kinds_done={"evaluate": 1})
    resumed = {"a": _stages("a"), "b": _stages("b", finished=5)}
    found = overview(resumed, NOW, [failed, b], NOW)
    assert (found.stages_done, found.left_s) == (3 + 4, 0.0)
