"""What a driver shows while its trajectories run: in a terminal of 80 columns, and without one."""

import io
import re
import time
from dataclasses import replace

import pytest
from rich.console import Console

from orchestrator.execution.progress import ProgressBoard
from orchestrator.reporting.data.run_status import RunStatus, run_status
from orchestrator.reporting.live_view import ProgressLines, live_view, render, trajectory_line
from orchestrator.storage.control import Control
from orchestrator.storage.run_progress import Overview, RunProgress, TrajectoryProgress

NOW = 50_000.0
A = TrajectoryProgress(
    "smollm2-135m--iterabre--seed0", 2, 3, "score", 3, 10, "sequences", key="s", started_at=NOW - 70,
    stages_done=4, stages_total=17, measured={"wikitext2/token_perplexity": 24.126},
)  # fmt: skip
EVALUATION = replace(
    A, iteration=1, stage="evaluate", phase="recovered", key="e", done=48, total=297,
    note="windows of wikitext2", background=True,
)  # fmt: skip
PLANNED = {A.trajectory: 3, "smollm2-135m--laco--seed0": 1}


def _status(*reports: TrajectoryProgress, left_s: float | None = 1500.0, done: int = 4) -> RunStatus:
    overview = Overview(done, 22, NOW - 250, left_s, "" if left_s else "recover")
    return run_status(PLANNED, {}, RunProgress(NOW, "", False, reports, overview), Control(), NOW)


def _shown(status: RunStatus, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(status, NOW))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_terminal_of_80_columns_shows_all_that_goes_on() -> None:
    lines = _shown(_status(A, EVALUATION))
    assert lines == [
        "running; Ctrl-C ends in good order, --resume continues",
        "2 trajectories: 1 running, 1 not started",
        "4 of 22 stages done, 4:10 so far, about 25 min left",
        "smollm2-135m--iterabre--seed0  running  iteration 2/3  stages 4/17",
        "    last measured: wikitext2 perplexity 24.13",
        "    score  ━━━───────── 3/10 sequences  for 1:10",
        "    evaluate (recovered, iteration 1)  ━─────────── 48/297 windows of wikitext2…",
        "smollm2-135m--laco--seed0  not started",
    ]


def test_time_left_that_is_not_known_is_said_so() -> None:
    assert "4:10 so far, time left: known after the first recover stage" in _shown(_status(left_s=None))[2]


def test_a_line_names_all_stages_that_go_on() -> None:
    (view, _) = _status(A, EVALUATION).trajectories
    assert trajectory_line(view) == (
        "smollm2-135m--iterabre--seed0: iteration 2/3, 4/17 stages done, wikitext2 perplexity 24.13: "
        "score 3/10 sequences; evaluate (recovered, iteration 1) 48/297 windows of wikitext2"
    )
    # Between two stages of its own, the trajectory is at its evaluation alone.
    (view, _) = _status(replace(A, key="", stage=""), EVALUATION).trajectories
    assert trajectory_line(view).endswith(": evaluate (recovered, iteration 1) 48/297 windows of wikitext2")
    lost = replace(A, restarted="an actor was lost; restarted, try 1 of 3")
    (view, _) = _status(lost).trajectories
    assert trajectory_line(view).endswith("score 3/10 sequences (an actor was lost; restarted, try 1 of 3)")


def test_a_line_is_new_when_something_changed_and_once_a_minute_at_most() -> None:
    lines = ProgressLines()
    first = lines.new(_status(A), NOW)
    assert first[1:] == [
        "all: 4 of 22 stages done, 4:10 so far, about 25 min left; 2 trajectories: 1 running, 1 not started"
    ]
    assert lines.new(_status(replace(A, done=4)), NOW + 30) == []
    assert len(lines.new(_status(replace(A, done=5)), NOW + 61)) == 2
    # The same as before: not before ten minutes have passed.
    assert lines.new(_status(replace(A, done=5)), NOW + 200) == []
    assert lines.new(_status(replace(A, done=5)), NOW + 700)
    # What a stage waits for changes all the time; that it waits is what matters.
    waiting = replace(A, waits_for="1 GPU; free are 0 of 4", waits_since=NOW + 700)
    assert lines.new(_status(waiting), NOW + 702) == []  # its process starts, perhaps
    assert "waits for 1 GPU; free are 0 of 4" in lines.new(_status(waiting), NOW + 711)[0]
    assert lines.new(_status(replace(waiting, waits_for="1 GPU; free are 1 of 4")), NOW + 712) == []


@pytest.mark.parametrize(
    ("stage", "note", "shown"),
    [
        ("", "", "done, wikitext2 perplexity 24.13"),
        ("failed", "CUDA is out of memory", "failed, wikitext2 perplexity 24.13: CUDA is out of memory"),
    ],
)
def test_an_end_is_one_line(stage: str, note: str, shown: str) -> None:
    lines, ended = ProgressLines(), replace(A, key="", stage=stage, note=note, finished=True)
    assert lines.new(_status(ended), NOW)[0] == f"smollm2-135m--iterabre--seed0: {shown}"
    assert lines.new(_status(ended), NOW + 10_000) == []


def test_without_a_terminal_each_stage_is_a_line_with_the_time() -> None:
    board, stream = ProgressBoard(), io.StringIO()
    with live_view(board.snapshot, PLANNED, stream=stream):
        for stage in ("score", "recover"):
            board.post(replace(A, stage=stage, key=stage, total=0, measured={}, started_at=time.time()))
            time.sleep(1.1)
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[9:] for line in lines] == [
        f"smollm2-135m--iterabre--seed0: iteration 2/3, 4/17 stages done: {stage}"
        for stage in ("score", "recover")
    ]
