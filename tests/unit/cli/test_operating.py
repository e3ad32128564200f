"""`status`, `logs`, `cancel`, `pause`, `continue`, `prioritise`: what an operator does from any machine."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.contracts import Progress, ScoreResult, ScoreSpec
from orchestrator.execution.local import LocalBackend
from orchestrator.storage.control import Control, read_control, write_control
from orchestrator.storage.run_progress import read_progress
from orchestrator.storage.stage_logs import LogWriter
from orchestrator.storage.stage_store import Store
from tests.support.tiny_campaign import tiny_campaign, write_campaign
from tests.unit.cli.command import iterabre

FIRST, SECOND = "llama--first--seed0", "llama--second--seed0"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("operating")
    tiny_campaign(directory)
    return directory


@pytest.fixture
def campaign(place: Path, tmp_path: Path) -> dict[str, Any]:
    found = tiny_campaign(place)
    method = found["methods"][0]
    other = {**method["recovery"], "learning_rate": 2e-3}
    found["methods"] = [
        {**method, "name": "first"},
        {
            **method,
            "name": "second",
            "priority": 1,
            "recovery": other,
        },
    ]
    found["targets"] = [{"layers": 3}]
    found["storage"]["path"] = str(tmp_path / "runs")
    return found


def test_a_run_leaves_its_progress_and_logs(campaign: dict[str, Any], tmp_path: Path) -> None:
    assert iterabre("campaign", write_campaign(campaign, tmp_path / "c.yaml")).exit_code == 0
    run = tmp_path / "runs/tiny"
    status = json.loads(iterabre("status", run, "--json").out)["run"]
    assert status["state"] == "ended"
    assert {each["trajectory"]: each["state"] for each in status["trajectories"]} == {
        FIRST: "done",
        SECOND: "done",
    }
    assert all(each["stages_done"] == each["stages_total"] > 0 for each in status["trajectories"])
    assert "2 trajectories: 2 done" in iterabre("status", run).out
    watched = iterabre("status", run, "--watch")
    assert (watched.exit_code, watched.out.count("2 trajectories")) == (0, 1)

    listed = iterabre("logs", run).out
    assert FIRST in listed
    assert "recover" in listed
    recovery = iterabre("logs", run, "--trajectory", FIRST, "--stage", "recover").out
    assert recovery.splitlines()[0].endswith(" starts")
    assert " took " in recovery.splitlines()[-1]
    assert "==>" not in recovery
    everything = iterabre("logs", run, "--trajectory", FIRST).out
    assert everything.count("==> ") >= 3
    assert (
        len(iterabre("logs", run, "--trajectory", FIRST, "--stage", "recover", "--lines", 1).out.splitlines())
        == 1
    )
    assert "starts" in iterabre("logs", run, "--stage", "driver").out


def test_logs_are_followed_as_they_grow(
    campaign: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _planned_only(campaign, tmp_path)
    run = tmp_path / "runs/tiny"
    writer = LogWriter(Store(str(run)))
    writer.write("a/001-score-0123456789ab.log", [f"line {number}" for number in range(20)])
    log = run / "logs/a/001-score-0123456789ab.log"
    rounds = iter(range(3))

    def grow(_seconds: float) -> None:
        match next(rounds):
            case 0:
                with log.open("a") as target:
                    target.write("half a ")
                writer.write("b/001-score-0123456789ab.log", [f"{number} of b" for number in range(12)])
            case 1:
                with log.open("a") as target:
                    target.write("line\nand one\n")
            case _:
                raise KeyboardInterrupt

    # Of this module only: threads that other tests left in this process sleep too.
    monkeypatch.setattr("orchestrator.cli.logs.time", SimpleNamespace(sleep=grow))
    answer = iterabre("logs", run, "--follow")
    assert (answer.exit_code, answer.err.strip()) == (1, "iterabre: stopped")
    assert answer.out.splitlines() == [
        *(f"line {number}" for number in range(10, 20)),
        "==> b/001-score-0123456789ab.log <==",
        *(f"{number} of b" for number in range(12)),
        "==> a/001-score-0123456789ab.log <==",
        "half a line",
        "and one",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("logs", "--trajectory", "llama--frst--seed0"), "did you mean llama--first--seed0"),
        (("logs", "--trajectory", FIRST, "--stage", "generate"), "no log of such a stage"),
        (("cancel",), "--trajectory ID"),
        (("cancel", "--trajectory", "llama--frst--seed0"), "did you mean llama--first--seed0"),
        (("continue", "--trajectory", "nothing"), "unknown trajectory 'nothing'"),
        (("prioritise", "3"), "--method NAME or --model ID"),
        (("prioritise", "3", "--method", "frst"), "unknown method 'frst'; did you mean first"),
        (("prioritise", "3", "--model", "qwen"), "unknown model 'qwen'"),
    ],
)
def test_what_is_not_there_is_refused(
    campaign: dict[str, Any], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    _planned_only(campaign, tmp_path)
    command, *options = arguments
    answer = iterabre(command, tmp_path / "runs/tiny", *options)
    assert answer.exit_code == 2
    assert said in answer.err
    assert read_control(Store(str(tmp_path / "runs/tiny"))) == Control()


def test_without_a_run_nothing_is_written(tmp_path: Path) -> None:
    for command in (("pause",), ("continue",), ("logs",), ("cancel", "--trajectory", "a")):
        answer = iterabre(command[0], tmp_path / "none", *command[1:])
        assert answer.exit_code == 2
        assert "holds no run" in answer.err
    assert not (tmp_path / "none").exists()


def test_commands_say_what_they_did_and_leave_it_in_the_run(campaign: dict[str, Any], tmp_path: Path) -> None:
    _planned_only(campaign, tmp_path)
    run = tmp_path / "runs/tiny"
    assert iterabre("cancel", run, "--trajectory", FIRST, "--trajectory", SECOND).out.startswith(
        "cancelled: "
    )
    assert iterabre("continue", run, "--trajectory", SECOND).exit_code == 0
    assert iterabre("pause", run).out.startswith("paused: ")
    assert iterabre("prioritise", run, "7", "--method", "second", "--model", "llama").exit_code == 0
    assert read_control(Store(str(run))) == Control(True, (FIRST,), {"second": 7}, {"llama": 7})
    shown = iterabre("status", run).out
    assert "1 cancelled, 1 not started" in shown
    assert "starts nothing before `iterabre continue`" in shown
    assert iterabre("continue", run).exit_code == 0
    assert not read_control(Store(str(run))).paused


def test_a_cancelled_trajectory_ends_before_its_next_stage_and_may_go_on_later(
    campaign: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = write_campaign(campaign, tmp_path / "c.yaml"), tmp_path / "runs/tiny"
    _at_the_first_scoring(monkeypatch, lambda: _cancel(run))
    answer = iterabre("campaign", config)
    assert answer.exit_code == 0, answer.err
    assert f"cancelled: {FIRST}: by an operator" in answer.err
    assert not (run / f"models/{FIRST}").exists()
    assert (run / f"models/{SECOND}/3-layers").exists()
    status = json.loads(iterabre("status", run, "--json").out)
    assert status["outcomes"][FIRST]["state"] == "cancelled"
    # `--resume` leaves it.
    assert iterabre("campaign", config, "--resume").exit_code == 0
    assert not (run / f"models/{FIRST}").exists()
    assert iterabre("continue", run, "--trajectory", FIRST).exit_code == 0
    assert iterabre("campaign", config, "--resume").exit_code == 0
    assert (run / f"models/{FIRST}/3-layers").exists()
    assert json.loads(iterabre("status", run, "--json").out)["outcomes"][FIRST]["state"] == "done"


def test_a_paused_run_starts_nothing_until_it_is_continued(
    campaign: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = write_campaign(campaign, tmp_path / "c.yaml"), tmp_path / "runs/tiny"
    store, seen = Store(str(run)), []

    def go_on() -> None:
        deadline = time.monotonic() + 60
        while not (waiting := _waits_for(store)) and time.monotonic() < deadline:
            time.sleep(0.1)
        seen.append((waiting, {file.parent.name for file in run.glob("stages/*/*")}))
        write_control(store, Control())

    _at_the_first_scoring(monkeypatch, lambda: write_control(store, Control(paused=True)))
    operator = threading.Thread(target=go_on)
    operator.start()
    answer = iterabre("campaign", config)
    operator.join()
    assert answer.exit_code == 0, answer.err
    ((waiting, stages),) = seen
    assert waiting == "the run is paused; `iterabre continue` goes on"
    assert stages == {"evaluate", "score"}  # what ran went on to its end
    assert (run / f"models/{FIRST}/3-layers").exists()


def test_priorities_are_no_change_of_a_campaign(campaign: dict[str, Any], tmp_path: Path) -> None:
    config = write_campaign(campaign, tmp_path / "c.yaml")
    assert iterabre("campaign", config).exit_code == 0
    answer = iterabre("campaign", config, "--resume", "--set", "methods.1.priority=3")
    assert answer.exit_code == 0, answer.err


def _planned_only(campaign: dict[str, Any], tmp_path: Path) -> None:
    """Leave a run in which nothing has been computed."""
    from orchestrator.config import parse_config
    from orchestrator.storage.run_manifest import open_run

    config = parse_config(campaign, "c.yaml")
    store = Store.of_campaign(config.storage.path, config.name)
    trajectories = [
        {"trajectory": name, "model": "llama", "method": name.split("--")[1]} for name in (FIRST, SECOND)
    ]
    open_run(store, config.model_dump(mode="json"), dict.fromkeys((FIRST, SECOND), 1), (), trajectories)


def _at_the_first_scoring(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Have `act` be called while the first stage of scoring runs, once what it wrote may be read."""
    monkeypatch.setattr("orchestrator.storage.control.READ_INTERVAL_S", 0.1)
    done: list[bool] = []
    before = LocalBackend.score

    def score(self: LocalBackend, spec: ScoreSpec, progress: Progress) -> ScoreResult:
        if not done:
            done.append(True)
            act()
            time.sleep(0.5)
        return before(self, spec, progress)

    monkeypatch.setattr(LocalBackend, "score", score)


def _cancel(run: Path) -> None:
    assert iterabre("cancel", run, "--trajectory", FIRST).exit_code == 0


def _waits_for(store: Store) -> str:
    saved = read_progress(store)
    return next((each.waits_for for each in saved.trajectories if each.waits_for), "") if saved else ""
