"""The progress that the driver leaves in the storage."""

import json
import time
from pathlib import Path

import pytest

from orchestrator.errors import WorkError
from orchestrator.storage.run_progress import (
    RunProgress,
    TrajectoryProgress,
    progress_written,
    read_progress,
    write_progress,
)
from orchestrator.storage.stage_store import Store

GOING = TrajectoryProgress(
    "a", 1, 3, "recover", 2, 8, "steps", key="k", places=("n GPU 0",), perplexities={"fox": 2.5}
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert read_progress(store) is None
    write_progress(store, RunProgress(5.0, "head", False, (GOING,)))
    found = read_progress(store)
    assert found is not None
    assert (found.written_at, found.host, found.ended) == (5.0, "head", False)
    assert found.trajectories[0].perplexities == {"fox": 2.5}
    assert tuple(found.trajectories[0].places) == ("n GPU 0",)


def test_another_versions_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_progress(store, RunProgress(5.0, "head", False, (GOING,)))
    file = tmp_path / "progress.json"
    content = json.loads(file.read_text())
    content["trajectories"][0]["new_field"] = 1
    file.write_text(json.dumps(content))
    assert read_progress(store) is not None
    file.write_text("{}")
    assert read_progress(store) is None


def test_it_is_written_at_once_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    shown = [GOING]
    with progress_written(store, lambda: shown, interval_s=0.05):
        first = read_progress(store)
        assert first is not None
        assert not first.ended
        deadline = time.monotonic() + 10
        while (now := read_progress(store)) and now.written_at == first.written_at:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    last = read_progress(store)
    assert last is not None
    assert last.ended


def test_a_lost_board_and_a_failing_storage_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, shown = Store(str(tmp_path)), [GOING]

    def snapshot() -> list[TrajectoryProgress]:
        if not shown:
            raise RuntimeError("the board is lost")
        return shown

    with progress_written(store, snapshot, interval_s=0.01):
        shown = []
        time.sleep(0.05)
    last = read_progress(store)
    assert last is not None
    assert (last.ended, [each.trajectory for each in last.trajectories]) == (True, ["a"])

    def fail(_uri: str, _data: bytes) -> None:
        raise WorkError("the disk is full")

    monkeypatch.setattr("orchestrator.storage.run_progress.write_bytes", fail)
    with progress_written(store, list, interval_s=0.01):
        time.sleep(0.05)
