"""Killed at a random moment and resumed, a campaign ends as if nothing had been; and the audit would tell."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.contracts import ScoreResult
from actors.stage_output import MARK
from orchestrator.storage.ledger import Ledger, Row
from orchestrator.storage.stage_store import Store
from tests.chaos.audit import faults, manifests, starts

SCORES = ScoreResult((0, 1), (0.5, 0.25), (1, 0), 1, 8, 3)
KEY = "0123456789abcdef"


def _run(directory: Path, value: float = 0.5) -> Path:
    """A run of one finished stage, with one number in the ledger."""
    store = Store(str(directory))
    store.commit("score", KEY, SCORES, {}, None, 1.0)
    row = Row(
        campaign="c", trajectory="t", model="m", method="i", seed=0, iteration=1, stage="score",
        key=KEY, metric="score", value=value,
    )  # fmt: skip
    Ledger(store.ledger_uri).append("part", [row])
    return directory


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return _run(tmp_path / "run"), _run(tmp_path / "undisturbed")


def _once(run: Path) -> list[tuple[str, float]]:
    return [(stage, committed - 1.0) for stage, committed in manifests(run).items()]


def test_a_run_like_the_undisturbed_one_has_no_faults(pair: tuple[Path, Path]) -> None:
    run, reference = pair
    assert faults(run, reference, _once(run)) == []
    # The same stage, begun twice before it was finished: it was under way when something died.
    assert faults(run, reference, 2 * _once(run)) == []


def test_a_finished_stage_that_is_begun_again_is_found(pair: tuple[Path, Path]) -> None:
    run, reference = pair
    ((stage, committed),) = manifests(run).items()
    again = [*_once(run), (stage, committed + 1.0)]
    assert faults(run, reference, again) == [f"{stage} was begun again, finished"]


def test_a_stage_that_no_log_tells_of_is_found(pair: tuple[Path, Path]) -> None:
    run, reference = pair
    assert faults(run, reference, []) == [f"score/{KEY[:12]} is finished and was never begun"]


@pytest.mark.parametrize(("value", "count"), [(0.5 * (1 + 2e-6), 1), (0.5 * (1 + 5e-7), 0)])
def test_another_number_is_found(tmp_path: Path, value: float, count: int) -> None:
    run = _run(tmp_path / "run", value)
    assert len(faults(run, _run(tmp_path / "undisturbed"), _once(run))) == count


@pytest.mark.parametrize(
    "left",
    [
        "ledger/.part.parquet.17-abcd.tmp",
        f"stages/score/{KEY}/payload-3/half.safetensors",
        "stages/recover/fedcba/payload-1/half.safetensors",
        "train/fedcba/step_000002/state.json",
        "driver.lock",
    ],
)
def test_what_is_left_behind_is_found(pair: tuple[Path, Path], left: str) -> None:
    run, reference = pair
    (run / left).parent.mkdir(parents=True, exist_ok=True)
    (run / left).touch()
    (fault,) = faults(run, reference, _once(run))
    assert fault.startswith("left behind: ")


def test_every_start_is_read_from_the_logs_of_the_trials(tmp_path: Path) -> None:
    logs = tmp_path / "session_1/logs"
    logs.mkdir(parents=True)
    logger = "orchestrator.execution.resolvers"
    line = f"2026-01-02 03:04:05,678 INFO {logger} t iteration 1: score 0123456789ab starts\n"
    (logs / "worker-a.err").write_text(line + "noise\n" + line.replace("starts", "took 1.0 s"))
    mark = f"{MARK}t/001-score-0123456789ab.log\t"
    (logs / "worker-b.err").write_text(mark + line.replace("05,678", "06,000"))
    os.symlink(tmp_path / "session_1", tmp_path / "session_latest")
    found = starts([tmp_path])
    assert [stage for stage, _ in found] == ["score/0123456789ab"] * 2
    assert found[1][1] - found[0][1] == pytest.approx(0.322)
    assert time.localtime(found[0][1])[:6] == (2026, 1, 2, 3, 4, 5)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_seven_kills(tmp_path: Path) -> None:
    """One of each victim; `make chaos` has 25."""
    command = [sys.executable, "-m", "tests.chaos", "--runs", "7", "--seed", "1", "--directory"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(tmp_path)
