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
    line,
    live_view,
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
