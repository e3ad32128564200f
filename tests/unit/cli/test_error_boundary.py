"""What no code expects: one line, a file with the traceback, and the right exit code."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.scoring.criteria import CRITERIA
from orchestrator.cli.error_boundary import error_boundary
from orchestrator.errors import WorkError
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.unit.cli.command import iterabre

REVERSE = CRITERIA["reverse"]


def _breaks(error: BaseException) -> Callable[..., Any]:
    def measure(*_arguments: Any, **_named: Any) -> Any:
        raise error

    return measure


@pytest.fixture
def campaign(tmp_path: Path) -> dict[str, Any]:
    described = tiny_campaign(tmp_path)
    described["targets"] = [{"layers": 3}]
    (method,) = described["methods"]
    method["recovery"] = {"objective": "none"}
    sound = method | {"name": "sound", "scoring": {"criterion": "deepest"}}
    return described | {"methods": [method | {"scoring": {"criterion": "reverse"}}, sound]}


def _named_file(text: str) -> Path:
    found = re.search(r"the traceback is in (\S+\.log),", text)
    assert found is not None, text
    return Path(found[1])


def test_a_fault_in_a_command_is_one_line_with_a_file(
    campaign: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CRITERIA, "reverse", replace(REVERSE, measure=_breaks(KeyError("two\nlines"))))
    arguments = ("score", "--model", campaign["models"][0]["path"], "--criterion", "reverse")
    answer = iterabre(*arguments)
    assert (answer.exit_code, answer.out) == (1, "")
    reported = answer.err.splitlines()[-1]
    assert reported.startswith(
        r"iterabre: KeyError: 'two\nlines': this is a fault of iterabre or of a plug-in"
    )
    assert "Traceback" not in answer.err
    file = _named_file(answer.err)
    assert "in measure" in file.read_text()
    file.unlink()
    shown = iterabre(*arguments, "--debug").err
    assert "Traceback" in shown
    _named_file(shown).unlink()


def test_a_fault_in_a_stage_fails_its_trajectory_alone(
    campaign: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CRITERIA, "reverse", replace(REVERSE, measure=_breaks(ZeroDivisionError("by zero"))))
    answer = iterabre("campaign", write_campaign(campaign, tmp_path / "campaign.yaml"))
    assert answer.exit_code == 1
    logs = tmp_path / "runs/tiny/logs"
    failed = [line for line in answer.err.splitlines() if line.startswith("failed: ")]
    assert failed == [
        "failed: llama--iterabre--seed0: ZeroDivisionError: by zero: this is a fault of iterabre or of a "
        f"plug-in; the traceback is in {logs}"
    ]
    assert "Traceback" not in answer.err
    assert "in measure" in (logs / "driver.log").read_text()
    assert (tmp_path / "runs/tiny/models/llama--sound--seed0/3-layers/config.json").exists()
    assert "ZeroDivisionError: by zero" in iterabre("status", tmp_path / "runs/tiny").err


def test_ctrl_c_is_one_line(
    campaign: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CRITERIA, "reverse", replace(REVERSE, measure=_breaks(KeyboardInterrupt())))
    file = write_campaign(campaign, tmp_path / "campaign.yaml")
    answer = iterabre("campaign", file)
    assert answer.exit_code == 1
    assert answer.err.splitlines()[-1] == "iterabre: stopped; finished stages are kept, --resume continues"
    answer = iterabre("score", "--model", campaign["models"][0]["path"], "--criterion", "reverse")
    assert (answer.exit_code, answer.err.splitlines()[-1]) == (1, "iterabre: stopped")


def test_the_traceback_goes_into_the_run_that_there_is(tmp_path: Path) -> None:
    by_system = pytest.raises(Exception, match="OSError: disk: the operating system refused it")
    with by_system as reported, error_boundary(lambda: tmp_path / "logs"):
        raise OSError("disk")
    assert _named_file(str(reported.value)).parent == tmp_path / "logs"

    def unreadable() -> Path:
        raise PermissionError("the run")

    with pytest.raises(Exception, match="ValueError: x") as reported, error_boundary(unreadable):
        raise ValueError("x")
    _named_file(str(reported.value)).unlink()


class Panic(BaseException):
    """What pyo3 makes of a panic in Rust."""


def test_a_panic_is_no_way_out() -> None:
    with pytest.raises(Exception, match="Panic: index out of bounds") as reported, error_boundary():
        raise Panic("index out of bounds")
    _named_file(str(reported.value)).unlink()
    with pytest.raises(WorkError, match="stopped"), error_boundary():
        raise KeyboardInterrupt


@pytest.mark.parametrize("command", [("schema",), ("--help",)])
def test_a_reader_that_goes_away_is_no_news(command: tuple[str, ...]) -> None:
    program = [sys.executable, "-m", "orchestrator.cli", *command]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 1)
