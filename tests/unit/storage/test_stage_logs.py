"""Logs of stages: sorted from what workers print, kept on any storage, never a stage's failure."""

import io
import logging
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from actors.stage_output import (
    MARK,
    MarkingFormatter,
    RunningStage,
    at_work_on,
    output_of,
    running_stage,
)
from orchestrator.storage.layout import stage_log
from orchestrator.storage.stage_logs import (
    LogWriter,
    StageLogHandler,
    WorkerOutput,
    read_log,
    stage_logs,
)
from orchestrator.storage.stage_store import Store
from tests.support.object_store import loopback_s3

SCORE = RunningStage("score a iteration 1", stage_log("a", 1, "score", "0123456789abcdef"))


def test_the_name_of_a_log_says_which_stage() -> None:
    assert SCORE.log == "a/001-score-0123456789ab.log"


def test_all_that_a_process_prints_in_the_body_is_marked() -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        with output_of(SCORE):
            print("here")
            assert running_stage() == SCORE
        print("later")
    assert out.getvalue().splitlines() == [f"{MARK}{SCORE.log}", "here", MARK, "later"]
    assert err.getvalue().splitlines() == [f"{MARK}{SCORE.log}", MARK]
    assert running_stage() is None


def test_a_process_of_several_stages_marks_each_line_of_its_log() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "one\ntwo", None, None)
    formatter = MarkingFormatter("%(message)s")
    assert formatter.format(record) == "one\ntwo"
    with at_work_on(SCORE):
        assert formatter.format(record).splitlines() == [
            f"{MARK}{SCORE.log}\tone",
            f"{MARK}{SCORE.log}\ttwo",
        ]


def _lines(*lines: str, pid: int = 7, is_err: bool = False, **more: Any) -> dict[str, Any]:
    return {"pid": pid, "ip": "10.0.0.1", "is_err": is_err, "lines": list(lines), **more}


def test_what_workers_print_goes_to_the_stage_that_they_are_at(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    output = WorkerOutput(LogWriter(store))
    output(_lines("before", actor_name="Score"))
    output(_lines(f"{MARK}{SCORE.log}", "first", "", "second"))
    output(_lines("another process", pid=8))
    # The standard error of the same process is read independently.
    output(_lines("not marked yet", is_err=True))
    output(_lines("third"))
    output(_lines(MARK, "after"))
    output(_lines(f"{MARK}{SCORE.log}\tof a trial", pid=9, task_name="trial"))
    assert read_log(store, SCORE.log).decode().splitlines() == [
        "(pid=7 10.0.0.1) first",
        "(pid=7 10.0.0.1) second",
        "(pid=7 10.0.0.1) third",
        "of a trial",
    ]
    assert read_log(store, "workers.log").decode().splitlines() == [
        "(Score pid=7 10.0.0.1) before",
        "(worker pid=8 10.0.0.1) another process",
        "(worker pid=7 10.0.0.1) not marked yet",
        "(worker pid=7 10.0.0.1) after",
        "(trial pid=9 10.0.0.1) of a trial",
    ]


def test_what_ray_says_to_its_developers_is_left_out(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    output = WorkerOutput(LogWriter(store))
    output(_lines("Traceback (most recent call last):", actor_name="PlacementGroupCleaner"))
    noise = "core_worker.cc:2465: Actor with class name: 'PreemptionWatcher' and ID: '67' has constructor"
    output(_lines(noise, "a word of ours", actor_name="TrainController"))
    lines = read_log(store, "workers.log").decode().splitlines()
    assert lines == ["(TrainController pid=7 10.0.0.1) a word of ours"]


def test_logs_are_found_by_trajectory_iteration_and_stage(tmp_path: Path) -> None:
    store, writer = Store(str(tmp_path)), LogWriter(Store(str(tmp_path)))
    assert stage_logs(store) == []
    for name in (stage_log("b", 0, "evaluate", "f" * 64), stage_log("a", 2, "recover", "e" * 64), SCORE.log):
        writer.write(name, ["x"])
    writer.write("driver.log", ["y"])
    assert [(each.trajectory, each.iteration, each.stage, each.key) for each in stage_logs(store)] == [
        ("a", 1, "score", "0123456789ab"),
        ("a", 2, "recover", "e" * 12),
        ("b", 0, "evaluate", "f" * 12),
    ]


def test_a_log_that_grows_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.storage.stage_logs.MAX_BYTES", 1000)
    store = Store(str(tmp_path))
    writer = LogWriter(store)
    for number in range(100):
        writer.write(SCORE.log, [f"{number:99d}"])
    content = read_log(store, SCORE.log).decode().splitlines()
    assert len(content) == 11
    assert content[-1].startswith("(what follows is left out")


def test_a_log_that_cannot_be_written_fails_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "logs").write_text("no directory")
    writer = LogWriter(Store(str(tmp_path)))
    writer.write(SCORE.log, ["x"])
    writer.write(SCORE.log, ["y"])
    assert caplog.text.count("cannot be written") == 1


def test_records_of_this_process_go_to_the_log_of_their_stage(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    handler = StageLogHandler(LogWriter(store))
    logger = logging.getLogger("tests.stage_logs")
    logger.addHandler(handler)
    try:
        logger.warning("before")
        with at_work_on(SCORE):
            logger.warning("within")
    finally:
        logger.removeHandler(handler)
    assert read_log(store, SCORE.log).decode().endswith("WARNING tests.stage_logs within\n")
    assert b"before" not in read_log(store, SCORE.log)


def test_logs_reach_an_object_store_and_a_second_driver_goes_on_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.storage.stage_logs.UPLOAD_INTERVAL_S", 0.1)
    with loopback_s3(monkeypatch) as uri:
        store = Store(f"{uri}/run")
        for machine in ("one", "two"):
            monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / machine))
            writer = LogWriter(store)
            with writer.uploading():
                writer.write(SCORE.log, [machine])
        # On the second machine again, where a part of it lies.
        writer = LogWriter(store)
        with writer.uploading():
            writer.write(SCORE.log, ["three"])
        assert read_log(store, SCORE.log).decode().splitlines() == ["one", "two", "three"]
        assert [each.trajectory for each in stage_logs(store)] == ["a"]
