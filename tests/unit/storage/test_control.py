"""What an operator wants of a run: written by a command, read by the coordinator."""

import pickle
import time
from pathlib import Path

import pytest

from orchestrator.errors import RequestError
from orchestrator.storage.control import (
    Control,
    ControlReader,
    Directives,
    Origin,
    directives,
    read_control,
    write_control,
)
from orchestrator.storage.stage_store import Store

ORIGINS = {
    "m--kd--seed0": Origin("kd", "m", 2, 1),
    "m--sft--seed0": Origin("sft", "m", 0, 1),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert read_control(store) == Control()
    control = Control(True).cancelling(["b", "a"]).cancelling(["a", "c"]).continuing(["b"])
    control = control.prioritising(["kd"], [], 3).prioritising([], ["m"], -1)
    write_control(store, control)
    assert read_control(store) == Control(True, ("a", "c"), {"kd": 3}, {"m": -1})


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for content in ("[]", "{", '{"cancelled": 3}', '{"methods": {"kd": "first"}}'):
        (tmp_path / "control.json").write_text(content)
        with pytest.raises(RequestError, match=r"control\.json cannot be read"):
            read_control(store)


def test_priorities_of_the_file_hold_until_a_command_replaces_them() -> None:
    assert directives(Control(), ORIGINS) == Directives(
        False, frozenset(), {"m--kd--seed0": 3, "m--sft--seed0": 1}
    )
    control = Control(True, ("m--kd--seed0",), {"kd": 0, "sft": 5}, {"m": 10})
    assert directives(control, ORIGINS) == Directives(
        True, frozenset(["m--kd--seed0"]), {"m--kd--seed0": 10, "m--sft--seed0": 15}
    )


def test_the_reader_follows_the_file_and_never_fails(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    reader = pickle.loads(pickle.dumps(ControlReader(store, ORIGINS, interval_s=0.05)))
    assert reader() == directives(Control(), ORIGINS)
    write_control(store, Control(paused=True))
    _until(lambda: reader().paused)
    # What cannot be read leaves all as it was.
    (tmp_path / "control.json").write_text("{")
    time.sleep(0.2)
    assert reader().paused
    write_control(store, Control())
    _until(lambda: not reader().paused)


def test_the_reader_does_not_wait_for_a_slow_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ControlReader(Store(str(tmp_path)), {}, interval_s=0.0)
    reader()
    monkeypatch.setattr("orchestrator.storage.control.PATIENCE_S", 0.1)
    monkeypatch.setattr("orchestrator.storage.control.read_bytes", lambda _uri: time.sleep(5))
    started = time.monotonic()
    for _ in range(100):
        reader()
    assert time.monotonic() - started < 1


def _until(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)
