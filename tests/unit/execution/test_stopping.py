"""The first Ctrl-C or SIGTERM ends a campaign in good order, the second at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.execution.stopping import StopRequest, patience_s
from orchestrator.storage.ledger import Ledger
from tests.support.tiny_campaign import tiny_campaign, write_campaign

IN_A_JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}


def wait_for(condition: threading.Event) -> None:
    """Wait as the main thread does, where signals are handled."""
    for _ in range(200):
        if condition.wait(0.05):
            return
    raise AssertionError("nothing happened")


def logged(run: Path) -> list[str]:
    """Return the lines of all logs of a run."""
    return [line for file in run.glob("logs/**/*.log") for line in file.read_text().splitlines()]


def signalled(signum: signal.Signals) -> None:
    """Send this process a signal and give it time to act."""
    os.kill(os.getpid(), signum)
    time.sleep(10)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_the_first_signal_asks_and_the_second_ends(signum: signal.Signals) -> None:
    asked, reasons, said = threading.Event(), [], []
    stop = StopRequest(60, said.append)

    def ask(reason: str) -> None:
        reasons.append(reason)
        asked.set()

    with stop.on_signals(), stop.calls(ask):
        os.kill(os.getpid(), signum)
        wait_for(asked)
        with pytest.raises(KeyboardInterrupt):
            signalled(signum)
    name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
    assert reasons == [f"stopped by {name}"]
    assert said == [
        f"Stopping ({name}): no further stage starts; those at work have 60 s to finish or to reach a "
        f"checkpoint. {name} once more stops at once."
    ]


def test_stages_that_take_longer_are_not_waited_for() -> None:
    said: list[str] = []
    stop = StopRequest(0.2, said.append)
    with stop.on_signals(), stop.calls(lambda _: None), pytest.raises(KeyboardInterrupt):
        signalled(signal.SIGINT)
    assert said[-1] == "Stopping now: stages were still at work after 0.2 s."


def test_a_coordinator_that_is_started_again_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.execution.stopping.REPEAT_S", 0.05)
    told, twice = [], threading.Event()

    def ask(reason: str) -> None:
        told.append(reason)
        if len(told) == 2:
            twice.set()

    stop = StopRequest(60, lambda _: None)
    with stop.on_signals(), stop.calls(ask):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(twice)
    assert set(told) == {"stopped by SIGTERM"}


def test_while_nothing_is_at_work_the_first_signal_ends() -> None:
    stop = StopRequest(60)
    with stop.on_signals(), pytest.raises(KeyboardInterrupt):
        signalled(signal.SIGTERM)


def test_a_stopped_job_has_as_long_as_ray_gives_it() -> None:
    assert patience_s(signal.SIGINT, 120, IN_A_JOB) == 120
    assert patience_s(signal.SIGTERM, 120, {}) == 120
    assert patience_s(signal.SIGTERM, 120, IN_A_JOB) == 1
    assert patience_s(signal.SIGTERM, 120, {**IN_A_JOB, "RAY_JOB_STOP_WAIT_TIME_S": "62"}) == 60
    assert patience_s(signal.SIGTERM, 120, {**IN_A_JOB, "RAY_JOB_STOP_WAIT_TIME_S": "600"}) == 120
    assert patience_s(signal.SIGTERM, 120, {**IN_A_JOB, "RAY_JOB_STOP_WAIT_TIME_S": "1"}) == 0


def test_a_stopped_training_goes_on_from_the_step_where_it_stopped(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a recovery whose next checkpoint would be far away."""
    campaign = tiny_campaign(tmp_path) | {"targets": [{"layers": 3}]}
    campaign["methods"][0]["recovery"] |= {"max_tokens": 32 * 200, "checkpoint_steps": 1000}
    file = write_campaign(campaign, tmp_path / "campaign.yaml")
    run = tmp_path / "runs/tiny"
    command = [sys.executable, "-m", "orchestrator.cli", "campaign", file, "--resume"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(line.endswith("starts") and "recover" in line for line in logged(run)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)  # some steps
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "Stopping (Ctrl-C): no further stage starts" in err
    said = " ".join(err.split())
    assert "ended early: stopped by Ctrl-C; finished stages are kept, --resume continues" in said
    stopped = next(line for line in logged(run) if "stopped on request after step" in line)
    step = int(stopped.partition("after step ")[2].split()[0])
    assert 1 <= step < 200
    assert [each.name for each in run.glob("train/*/*/step_*")] == [f"step_{step:06d}"]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    rows = Ledger(str(run / "ledger")).read().to_pylist()
    assert sorted(row["step"] for row in rows if row["metric"] == "loss") == list(range(200))
