"""What is shown of a campaign while it runs."""

import pickle
import subprocess
import sys
import time
from dataclasses import replace

from orchestrator.execution.coordinator_client import RayCoordinatorClient
from orchestrator.execution.progress import (
    ProgressBoard,
    RemoteReport,
    StageProgress,
    TrajectoryProgress,
    devices_in_use,
    merged,
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
    assert {report.counted_from for report in reports[1:]} == {1}
    assert {report.counted_since for report in reports[1:]} == {reports[1].counted_since}


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


STAGE = replace(PROGRESS, key="k", started_at=100.0, done=0, total=0)


def test_the_board_keeps_what_a_report_of_counts_alone_does_not_say() -> None:
    places = replace(STAGE, places=("w1 GPU 0",), done=20, total=40)
    counts = replace(STAGE, started_at=0.0, stages_done=5, stages_reused=1)
    assert merged(places, counts, 0.0) == replace(places, stages_done=5, stages_reused=1)
    # A worker got its copy before an evaluation in the background was finished.
    late = replace(places, done=21)
    assert merged(replace(places, stages_done=5), late, 0.0) == replace(late, stages_done=5)


def test_the_counts_never_go_back() -> None:
    board = ProgressBoard()
    counted = replace(STAGE, key="", started_at=0.0, stages_done=5, stages_reused=1, kinds_done={"score": 2})
    board.post(counted)
    # The next stage began while an evaluation beside it was counted; then the trajectory begins once more.
    board.post(replace(STAGE, key="next", stages_done=4))
    board.post(replace(STAGE, key="first", stages_done=0))
    (found,) = board.snapshot()
    assert (found.key, found.stages_done, found.stages_reused) == ("first", 5, 1)
    assert found.kinds_done == {"score": 2}


def test_a_stage_that_has_ended_is_shown_no_more() -> None:
    board = ProgressBoard()
    begun = replace(STAGE, started_at=time.time())
    board.post(replace(begun, done=39, total=40))
    board.post(replace(begun, key="", stage="", started_at=0.0, stages_done=5))
    board.post(replace(begun, done=40, total=40))  # a worker's report that was under way
    assert [(each.stage, each.key, each.stages_done) for each in board.snapshot()] == [("", "", 5)]


def test_a_restart_is_shown_until_the_stage_ends() -> None:
    board = ProgressBoard()
    progress = StageProgress(board.post, replace(PROGRESS, key="k"))
    progress.restarted("a worker was lost; restarted, try 1 of 3")
    progress(21, 40)
    assert board.snapshot()[0].restarted == "a worker was lost; restarted, try 1 of 3"
    StageProgress(board.post, replace(PROGRESS, key="l"))
    assert board.snapshot()[0].restarted == ""


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
    assert waiting.waits_for == "2 GPU on one node; free are 1 of 4"
    progress.runs_on(["w1 GPU 0"])
    progress(40, 40, "steps")
    (running,) = board.snapshot()
    assert (running.waits_for, list(running.places), running.done) == ("", ["w1 GPU 0"], 40)


def test_devices_that_actors_share_are_counted_once() -> None:
    places = ["w1 GPU 0", "w1 GPU 0", "w1 GPU 1 GPU 2", "w2 GPU 0", "w3", "w3"]
    assert devices_in_use(places) == 6
    assert devices_in_use([]) == 0


def test_what_reports_from_a_worker_loads_nothing_heavy_there() -> None:
    """Every process that computes unpickles it."""
    progress = StageProgress(_nowhere, PROGRESS, RayCoordinatorClient(None).stopping)
    unpickle = (
        "import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "print(*(name for name in ('ray.tune', 'ray.train', 'torch', 'pandas') if name in sys.modules))"
    )
    command = [sys.executable, "-c", unpickle, pickle.dumps(progress).hex()]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == ""


def _nowhere(progress: TrajectoryProgress) -> None:
    """Be a report that pickles."""
