"""What is shown of a campaign while it runs."""

import io
import pickle
import time
from dataclasses import replace

import pytest
from rich.console import Console

from orchestrator.execution.progress import (
    ProgressBoard,
    RemoteReport,
    StageProgress,
    TrajectoryProgress,
    devices_in_use,
    line,
    live_view,
    merged,
    render,
)

PROGRESS = TrajectoryProgress(
    "llama--a--seed0", 1, 3, "recover", 20, 40, "steps", stages_done=4, stages_total=19
)


def test_the_board_keeps_the_newest_of_each_trajectory() -> None:
    board = ProgressBoard()
    for done in (1, 2):
        board.post(replace(PROGRESS, trajectory="b", done=done))
        board.post(replace(PROGRESS, trajectory="a", done=done))
    assert [(a.trajectory, a.done) for a in board.snapshot()] == [("a", 2), ("b", 2)]


def test_a_stage_reports_now_and_then_and_at_its_end() -> None:
    reports: list[TrajectoryProgress] = []
    progress = StageProgress(reports.append, replace(PROGRESS, done=0, total=0))
    started = time.monotonic()
    for done in range(1, 1001):
        progress(done, 1000, "steps")
    most = 3 + (time.monotonic() - started) / 0.3
    assert 3 <= len(reports) <= most
    assert [reports[0].total, reports[1].done, reports[-1].done] == [0, 1, 1000]
    assert all(report.started_at == reports[0].started_at > 0 for report in reports)


def test_progress_travels_to_a_worker() -> None:
    class Handle:
        def __init__(self) -> None:
            self.posted: list[TrajectoryProgress] = []
            self.post = self
            self.remote = self.posted.append

    handle = Handle()
    StageProgress(RemoteReport(handle), PROGRESS)(1, 2, "x")
    assert [a.done for a in handle.posted] == [20, 1]
    assert pickle.loads(pickle.dumps(StageProgress(_ignore, PROGRESS)))


def _ignore(progress: TrajectoryProgress) -> None:
    pass


@pytest.mark.parametrize(
    ("progress", "shown"),
    [
        (PROGRESS, "llama--a--seed0: iteration 1/3, stage 5/19, recover, 20/40 steps"),
        (replace(PROGRESS, total=0), "llama--a--seed0: iteration 1/3, stage 5/19, recover"),
        (
            replace(PROGRESS, stages_done=19),
            "llama--a--seed0: iteration 1/3, stage 19/19, recover, 20/40 steps",
        ),
    ],
)
def test_a_line_says_where_a_trajectory_is(progress: TrajectoryProgress, shown: str) -> None:
    assert line(progress) == shown


def test_the_live_view_fits_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=100)
    waiting = replace(PROGRESS, trajectory="llama--b--seed0", total=0, stages_reused=2)
    console.print(render([PROGRESS, waiting, replace(PROGRESS, finished=True)]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("llama--a--seed0", "1/3", "4/19", "20/40 steps", "(2 reused)", "done", "--resume"):
        assert text in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_without_a_terminal_each_stage_is_a_line() -> None:
    board, stream = ProgressBoard(), io.StringIO()
    with live_view(board.snapshot, stream):
        for stage in ("score", "recover"):
            board.post(replace(PROGRESS, stage=stage, total=0))
            board.post(replace(PROGRESS, stage=stage, total=0, stages_done=5))
            time.sleep(1.1)
    assert stream.getvalue().splitlines() == [
        "llama--a--seed0: iteration 1/3, stage 6/19, score",
        "llama--a--seed0: iteration 1/3, stage 6/19, recover",
    ]


STAGE = replace(PROGRESS, key="k", started_at=100.0, done=0, total=0)


def test_the_board_keeps_what_a_report_of_counts_alone_does_not_say() -> None:
    places = replace(STAGE, places=("w1 GPU 0",), done=20, total=40)
    counts = replace(STAGE, started_at=0.0, stages_done=5, stages_reused=1)
    assert merged(places, counts, 0.0) == replace(places, stages_done=5, stages_reused=1)
    # A worker got its copy before an evaluation in the background was finished.
    late = replace(places, done=21)
    assert merged(replace(places, stages_done=5), late, 0.0) == replace(late, stages_done=5)


def test_a_worker_that_was_not_told_its_place_is_still_shown_there() -> None:
    placed = replace(STAGE, places=("w1 GPU 0",))
    assert merged(placed, replace(STAGE, done=1, total=9), 0.0).places == ("w1 GPU 0",)
    assert merged(placed, replace(STAGE, waits_for="1 GPU"), 0.0).places == ()
    assert merged(placed, replace(STAGE, key="another"), 0.0).places == ()


def test_the_board_adds_up_how_long_stages_wait() -> None:
    first = merged(None, replace(STAGE, waits_for="room"), 10.0)
    assert (first.waits_since, first.waited_s) == (10.0, 0.0)
    still = merged(first, replace(STAGE, waits_for="2 GPU"), 15.0)
    assert (still.waits_since, still.waited_s) == (10.0, 0.0)
    running = merged(still, STAGE, 30.0)
    assert (running.waits_since, running.waited_s) == (0.0, 20.0)
    later = merged(running, replace(STAGE, key="l", waits_for="room"), 40.0)
    ended = merged(later, replace(STAGE, key="l", finished=True), 45.0)
    assert ended.waited_s == 25.0


def test_what_goes_on_in_the_background_is_shown_until_it_ends() -> None:
    board = ProgressBoard()
    background = replace(STAGE, stage="evaluate", key="e", background=True)
    board.post(STAGE)
    board.post(background)
    assert [each.stage for each in board.snapshot()] == ["recover", "evaluate"]
    board.post(replace(background, finished=True))
    assert [each.stage for each in board.snapshot()] == ["recover"]
    board.post(background)
    # The trial has ended; it knows of no counts.
    board.post(TrajectoryProgress(STAGE.trajectory, 0, 3, "cancelled", finished=True))
    assert [(each.stage, each.stages_done) for each in board.snapshot()] == [("cancelled", 4)]


def test_a_stage_tells_what_it_waits_for_and_where_it_runs() -> None:
    board = ProgressBoard()
    progress = StageProgress(board.post, replace(PROGRESS, key="k"))
    progress.waits_for("2 GPU on one node; free are 1 of 4")
    (waiting,) = board.snapshot()
    assert line(waiting).endswith("recover, waits for 2 GPU on one node; free are 1 of 4")
    progress.runs_on(["w1 GPU 0"])
    progress(40, 40, "steps")
    (running,) = board.snapshot()
    assert (running.waits_for, list(running.places), running.done) == ("", ["w1 GPU 0"], 40)


def test_devices_that_actors_share_are_counted_once() -> None:
    places = ["w1 GPU 0", "w1 GPU 0", "w1 GPU 1 GPU 2", "w2 GPU 0", "w3", "w3"]
    assert devices_in_use(places) == 6
    assert devices_in_use([]) == 0
