"""Where a run is: what runs, where, since when, what waits and for what, what failed."""

from dataclasses import replace

import pytest

from orchestrator.reporting.data.run_status import RunStatus, run_status
from orchestrator.reporting.tables.status import duration, status_text, usage_text
from orchestrator.storage.control import Control
from orchestrator.storage.run_progress import RunProgress, TrajectoryProgress
from orchestrator.storage.trajectory_status import TrajectoryStatus
from orchestrator.storage.usage import Usage

NOW = 10_000.0
PLANNED = dict.fromkeys(("a", "b", "c", "d"), 3)
A = TrajectoryProgress(
    "a", 2, 3, "recover", 20, 40, "steps", started_at=NOW - 75, key="0123456789abcdef",
    places=("w1 GPU 0", "w1 GPU 1"), stages_done=7, stages_total=19, stages_reused=2,
)  # fmt: skip
A_BACKGROUND = replace(
    A, stage="evaluate", background=True, done=0, total=0, places=(),
    waits_for="1 GPU on one node; free are 0 of 4", waits_since=NOW - 45,
)  # fmt: skip
B = replace(A_BACKGROUND, trajectory="b", background=False, waited_s=130)
SAVED = RunProgress(NOW - 12, "head", False, (A, A_BACKGROUND, B))
FAILED = TrajectoryStatus("failed", "CUDA is out of memory", "c/001-recover-0123456789ab.log")


def _status(**changes: object) -> RunStatus:
    arguments: dict[str, object] = {
        "planned": PLANNED,
        "statuses": {"c": FAILED},
        "saved": SAVED,
        "control": Control(),
        "now": NOW,
    }
    return run_status(**{**arguments, **changes})  # type: ignore[arg-type]


def test_it_says_what_runs_where_and_what_waits_for_what() -> None:
    assert status_text(_status(), NOW).plain.splitlines() == [
        "running; as its driver on head wrote it 12 s ago",
        "4 trajectories: 1 running, 1 waiting, 1 failed, 1 not started",
        "a  running  iteration 2/3  stages 7/19 (2 reused)",
        "    recover  ━━━━━━────── 20/40 steps  for 1:15  on w1 GPU 0, w1 GPU 1",
        "    evaluate  waits 45 s for 1 GPU on one node; free are 0 of 4",
        "b  waiting  iteration 2/3  stages 7/19 (2 reused)  waited 2:10",
        "    evaluate  waits 45 s for 1 GPU on one node; free are 0 of 4",
        "c  failed",
        "    CUDA is out of memory",
        "    log: c/001-recover-0123456789ab.log",
        "d  not started",
    ]


@pytest.mark.parametrize(
    ("changes", "state", "states"),
    [
        ({"saved": None}, "not started", ["failed", "not started", "not started", "not started"]),
        ({"control": Control(paused=True)}, "paused", ["running", "waiting", "failed", "not started"]),
        ({"now": NOW + 100}, "silent", ["failed", "interrupted", "interrupted", "not started"]),
        (
            {"saved": replace(SAVED, ended=True), "control": Control(cancelled=("b",))},
            "ended",
            ["failed", "cancelled", "interrupted", "not started"],
        ),
        # Cancelled, and its stage has not ended yet.
        ({"control": Control(cancelled=("a",))}, "running", ["running", "waiting", "failed", "not started"]),
    ],
)
def test_states(changes: dict[str, object], state: str, states: list[str]) -> None:
    status = _status(**changes)
    assert (status.state, [each.state for each in status.trajectories]) == (state, states)


def test_a_trajectory_that_failed_and_is_resumed_runs() -> None:
    resumed = replace(SAVED, trajectories=(replace(A, trajectory="c"),))
    (first, *_) = _status(saved=resumed).trajectories
    assert (first.trajectory, first.state, first.reason) == ("c", "running", "")


def test_what_was_cancelled_and_may_go_on_is_not_started() -> None:
    statuses = {"a": TrajectoryStatus("cancelled", "by an operator")}
    ended = RunProgress(NOW, "head", True, (replace(A, stage="cancelled", finished=True),))
    shown = {
        each.trajectory: each.state
        for each in _status(statuses=statuses, saved=ended, planned={"a": 3}).trajectories
    }
    assert shown == {"a": "interrupted"}
    held = _status(statuses=statuses, saved=ended, planned={"a": 3}, control=Control(cancelled=("a",)))
    assert [each.state for each in held.trajectories] == ["cancelled"]


def test_hundreds_of_finished_trajectories_are_counted() -> None:
    planned = {f"t{number:03d}": 3 for number in range(200)}
    lines = status_text(_status(planned=planned, saved=None, statuses={}), NOW).plain.splitlines()
    assert lines[1] == "200 trajectories: 200 not started"
    assert lines[-1] == "… and 180 more that are not started or done"
    assert len(lines) < 30


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-1, "0 s"), (59.9, "59 s"), (185, "3:05"), (7385, "2:03:05")]
)
def test_a_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_the_cost_of_a_run_is_in_words() -> None:
    assert usage_text(Usage(up_s=7 * 3600, worked_s=4 * 1800, failed_s=4 * 600), 2.0) == (
        "cost: 2.00 device hours (4.00) at work, 0.67 device hours (1.33) in attempts that failed, "
        "4.33 device hours (8.67) idle"
    )
