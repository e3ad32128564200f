"""A whole campaign on a tiny model through the command line and real Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset as ds
import pytest
import yaml

from tests.support.tiny_models import save_tiny

TIMEOUT_S = 600
OF_THE_MACHINE = ("s", "tokens/s", "bytes", "forwards")
"""Units of numbers that differ between two runs that did the same."""

TEXT = "The gods and goddesses worshipped in the ancient land give rise to local manifestations .\n"

SECRETS = {
    "HF_TOKEN": "hf_PlantedInTheEnvironment0123",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret/key/0123",
    "WANDB_API_KEY": "planted0wandb0key0123456789",
}
"""What every command has in its environment, and nothing that it leaves may hold."""


def campaign(root: Path, name: str, **execution: Any) -> Path:
    """A campaign file: a tiny Llama of 6 layers to 4, with a short recovery each."""
    model = root / "model"
    if not model.exists():
        save_tiny(model, num_layers=6)
        (root / "text.txt").write_text(TEXT * 60)
    config = {
        "name": name,
        "models": [{"id": "tiny", "path": str(model)}],
        "methods": [
            {
                "name": "iterabre",
                "recovery": {
                    "loss": {"attention": 0.0},
                    "adapter": {"rank": 4},
                    "data": {"path": str(root / "text.txt")},
                    "sequence_length": 16,
                    "batch_size": 4,
                    "micro_batch_size": 2,
                    "max_tokens": 384,
                    "learning_rate": 1e-3,
                    "checkpoint_steps": 2,
                },
            }
        ],
        "targets": [{"layers": 4}],
        "evaluation": {
            "perplexity": [{"name": "text", "data": {"path": str(root / "text.txt")}, "context": 64}],
            "tasks": ["blimp_sample"],
            "limit": 8,
        },
        "execution": {
            "backend": "ray",
            "scoring": {"actors": 2, "cpus": 0.4},
            "training": {"workers": 2, "cpus": 0.5},
            **execution,
        },
        "storage": {"path": str(root / "runs")},
    }
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def start(file: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command, in a process group of its own."""
    command = [sys.executable, "-m", "orchestrator.cli", "campaign", str(file), *arguments]
    environment = {**os.environ, **SECRETS, "RAY_memory_monitor_refresh_ms": "0", "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ray_daemons() -> set[int]:
    """Ids of all processes that make up a Ray node, on this machine."""
    return {p.pid for p in psutil.process_iter() if p.name() in ("raylet", "gcs_server")}


def daemons_of(pid: int) -> set[int]:
    """Those among the descendants of `pid`."""
    return ray_daemons() & {child.pid for child in psutil.Process(pid).children(recursive=True)}


def wait_for_end_of(pids: set[int]) -> None:
    """A killed driver takes its Ray node with it: nothing is left behind."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=60)
    assert not alive


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    return output


def finish_watched(process: subprocess.Popen[str]) -> tuple[str, set[str]]:
    """Its output, and what a list of processes showed of those that it had started."""
    seen: set[str] = set()
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=0.5)
            assert process.returncode == 0, output
            return output, seen
        with suppress(psutil.Error):
            seen |= {" ".join(p.cmdline()) for p in psutil.Process(process.pid).children(recursive=True)}
    return finish(process), seen


def ledger(run: Path) -> list[dict[str, Any]]:
    return ds.dataset(sorted(str(f) for f in (run / "ledger").glob("*.parquet"))).to_table().to_pylist()


def numbers(run: Path) -> dict[tuple[Any, ...], float]:
    """Every measured number that says nothing of the machine: its speed, its memory, what it kept."""
    rows = [row for row in ledger(run) if row["unit"] not in OF_THE_MACHINE]
    where = ("iteration", "stage", "phase", "metric", "step", "layer")
    found = {tuple(row[name] for name in where): row["value"] for row in rows}
    assert len(found) == len(rows), "a number stands in the ledger twice"
    return found


def dropped(run: Path) -> list[int]:
    rows = sorted(ledger(run), key=lambda row: row["iteration"])
    return [row["layer"] for row in rows if row["metric"] == "dropped"]


def finished_stages(run: Path) -> dict[str, float]:
    """Time of each committed stage's manifest."""
    return {str(m.relative_to(run)): m.stat().st_mtime for m in run.glob("stages/*/*/manifest.json")}


def assert_same(run: Path, reference: Path) -> None:
    assert dropped(run) == dropped(reference)
    got, want = numbers(run), numbers(reference)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("campaigns")


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Path:
    """A run on Ray that nothing disturbed."""
    output, arguments = finish_watched(start(campaign(root, "undisturbed")))
    assert "undisturbed/models" in output.replace("\n", "")
    assert not any(secret in output for secret in SECRETS.values())
    assert any("ray::" in line for line in arguments)
    assert not [line for line in arguments if any(secret in line for secret in SECRETS.values())]
    return root / "runs" / "undisturbed"


def test_exported_model_opens_without_this_project(undisturbed: Path) -> None:
    (exported,) = undisturbed.glob("models/*/4-layers")
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(exported)!r})\n"
        f"t = AutoTokenizer.from_pretrained({str(exported)!r})\n"
        "out = m.generate(**t('The gods', return_tensors='pt'), max_new_tokens=4, do_sample=False)\n"
        "assert not {'actors', 'orchestrator'} & set(sys.modules)\n"
        "print(m.config.num_hidden_layers, out.shape[1] > 4)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.split() == ["4", "True"]
    provenance = json.loads((exported / "iterabre.json").read_text())
    assert provenance["dropped_source_layers"] == sorted(dropped(undisturbed))
    assert provenance["recovery_tokens"] == 2 * 384


def test_no_file_of_a_run_holds_a_secret_of_the_environment(undisturbed: Path) -> None:
    files = [file for file in undisturbed.rglob("*") if file.is_file()]
    kinds = {file.relative_to(undisturbed).parts[0] for file in files}
    assert {"campaign.json", "stages", "ledger", "logs", "report", "models"} <= kinds
    contents = {file: file.read_bytes() for file in files}
    assert not [(f, name) for f, c in contents.items() for name, s in SECRETS.items() if s.encode() in c]


def test_local_backend_gives_the_same_layers_and_numbers(root: Path, undisturbed: Path) -> None:
    finish(start(campaign(root, "local", backend="local")))
    run = root / "runs" / "local"
    assert_same(run, undisturbed)
    for name, score in numbers(run).items():
        if name[1] == "score":
            assert numbers(undisturbed)[name] == pytest.approx(score, abs=1e-5)


DISTURBANCES = (
    ("iteration 0: evaluate", signal.SIGTERM),
    ("iteration 1: score", signal.SIGKILL),
    ("iteration 1: recover", signal.SIGKILL),
    ("iteration 2: evaluate", signal.SIGKILL),
)


def test_stopped_and_killed_again_and_again_it_resumes_without_repeating_finished_stages(
    root: Path, undisturbed: Path
) -> None:
    file = campaign(root, "disturbed")
    run = root / "runs" / "disturbed"
    for moment, how in DISTURBANCES:
        before = finished_stages(run)
        process = start(file, "--resume")
        _wait_until_starts(run, moment, process)
        others = ray_daemons() - daemons_of(process.pid)
        # A job is stopped with its cluster left running; what is killed is killed with its own Ray.
        (os.kill if how == signal.SIGTERM else os.killpg)(process.pid, how)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        if how == signal.SIGTERM:
            assert process.returncode == 1, output
            assert "--resume continues" in output
        wait_for_end_of(ray_daemons() - others)
        after = finished_stages(run)
        assert {name: after[name] for name in before} == before, moment
    assert len(after) >= 5
    finish(start(file, "--resume"))
    final = finished_stages(run)
    assert {name: final[name] for name in after} == after
    assert len(final) == len(finished_stages(undisturbed))
    assert_same(run, undisturbed)


def _wait_until_starts(run: Path, moment: str, process: subprocess.Popen[str]) -> None:
    """Return while a stage such as `iteration 1: score` is running: seen from the trial's own logs."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout and process.stdout.read()
        logs = [log for log in (run / "logs").rglob("*.log") if log.name != "driver.log"]
        lines = [line for log in logs for line in log.read_text().splitlines()]
        if any(moment in line and line.endswith("starts") for line in lines):
            return
        time.sleep(0.05)
    raise AssertionError(f"{moment} never started")


@pytest.mark.long
def test_ctrl_c_lets_a_stage_finish_and_a_second_one_does_not(root: Path, tmp_path: Path) -> None:
    """As a terminal sends it: to the driver and to all processes of its Ray."""
    file = campaign(root, "interrupted")
    run = root / "runs" / "interrupted"
    process = start(file)
    _wait_until_starts(run, "iteration 1: score", process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, output
    said = " ".join(output.split())
    assert "Stopping (Ctrl-C): no further stage starts; those at work have 120 s" in said
    assert "ended early: stopped by Ctrl-C; finished stages are kept, --resume continues" in said
    assert "Traceback" not in output
    after = finished_stages(run)
    assert any("/score/" in name for name in after), after
    process = start(file, "--resume")
    _wait_until_starts(run, "iteration 1: recover", process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    before = time.monotonic()
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, output
    assert "--resume continues" in output
    assert time.monotonic() - before < 30
    finish(start(file, "--resume"))
    final = finished_stages(run)
    assert {name: final[name] for name in after} == after


def test_request_larger_than_the_cluster_is_refused_before_anything_is_written(root: Path) -> None:
    file = campaign(root, "too-large", training={"workers": 2, "cpus": 32.0})
    process = start(file)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2, output
    assert "execution.training needs 64 CPU (2 x 32)" in " ".join(output.split())
    assert not (root / "runs" / "too-large").exists()
