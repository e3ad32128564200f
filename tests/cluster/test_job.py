"""A campaign as a job of a cluster that asks for a token, with the project installed from its wheel."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.job_head import head, token
from tests.support.tiny_campaign import tiny_campaign

PROJECT = Path(__file__).parents[2]
TIMEOUT_S = 420

pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Jobs:
    """`ray job` on a cluster; every job runs in an empty directory, so that it finds what is installed."""

    address: str
    directory: Path
    environment: dict[str, str]

    def call(self, verb: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`ray job VERB`, with its output."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", verb, f"--address={self.address}"]
        return subprocess.run(
            [*command, *arguments],
            env={**self.environment, **environment},
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def submit(self, file: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """The campaign of `file` as a job."""
        entrypoint = [sys.executable, "-m", "orchestrator.cli", "campaign", str(file), "--resume"]
        return self.call("submit", *options, "--", *entrypoint)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the project is installed from its wheel, without its dependencies."""
    directory = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={directory}", str(PROJECT)], check=True)
    (wheel,) = directory.glob("iterabre-*.whl")
    site = directory / "site"
    subprocess.run([*pip, "install", "--no-deps", f"--target={site}", str(wheel)], check=True)
    return site


@pytest.fixture(scope="module")
def jobs(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    outside = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "PYTHONSAFEPATH"):
            patch.delenv(name, raising=False)
        patch.setenv("PYTHONPATH", str(installed))
        with token(), head(2) as address:
            yield Jobs(address, outside, dict(os.environ))


def _campaign(directory: Path, **changes: Any) -> Path:
    raw = {**tiny_campaign(directory), "targets": [{"layers": 3}], **changes}
    raw["execution"] = {
        "scoring": {"actors": 1, "cpus": 0.5},
        "training": {"workers": 1, "cpus": 0.5},
        "evaluation": {"cpus": 0.5},
    }
    file = directory / "tiny.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def test_the_job_runs_what_is_installed(jobs: Jobs, installed: Path) -> None:
    which = "import orchestrator.cli.app; print(orchestrator.cli.app.__file__)"
    done = jobs.call("submit", "--", sys.executable, "-c", which)
    assert done.returncode == 0, done.stdout
    assert str(installed / "orchestrator" / "cli.py") in done.stdout


def test_without_the_token_nothing_is_started(jobs: Jobs, tmp_path: Path) -> None:
    refused = jobs.call("submit", "--", "true", RAY_AUTH_TOKEN_PATH=str(_other_token(tmp_path)))
    assert refused.returncode != 0
    assert "nauthenticated" in refused.stdout or "token" in refused.stdout, refused.stdout


def _other_token(directory: Path) -> Path:
    file = directory / "another"
    file.write_text("0" * 64)
    return file


def test_a_wrong_campaign_fails_the_job(jobs: Jobs, tmp_path: Path) -> None:
    done = jobs.submit(_campaign(tmp_path, targets=[{"layers": 40}]))
    assert done.returncode == 1, done.stdout
    assert "exit code 2" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_run_in_the_jobs_own_directory_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    done = jobs.submit(_campaign(tmp_path, storage={"path": "runs"}))
    assert done.returncode == 1, done.stdout
    assert "storage.path 'runs' is relative, and in a Ray job" in done.stdout
    assert "exit code 2" in done.stdout


def test_a_stopped_job_ends_in_good_order_and_goes_on_as_another(jobs: Jobs, tmp_path: Path) -> None:
    file = _campaign(tmp_path)
    started = jobs.submit(file, "--no-wait", "--submission-id=first")
    assert started.returncode == 0, started.stdout
    run = tmp_path / "runs" / "tiny"
    before = _wait_for_a_stage(run)
    stopped = jobs.call("stop", "first")
    assert "stopped" in stopped.stdout, stopped.stdout
    assert "--resume continues" in jobs.call("logs", "first").stdout
    done = jobs.submit(file, "--submission-id=second")
    assert done.returncode == 0, done.stdout
    after = _manifests(run)
    assert {name: after[name] for name in before} == before
    states = [json.loads(file.read_text())["state"] for file in run.glob("trajectories/*.json")]
    assert states == ["done"]
    assert list(run.glob("models/*/3-layers/config.json"))


def _manifests(run: Path) -> dict[str, float]:
    return {str(m.relative_to(run)): m.stat().st_mtime for m in run.glob("stages/*/*/manifest.json")}


def _wait_for_a_stage(run: Path) -> dict[str, float]:
    """Stages that are finished when the first is."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if finished := _manifests(run):
            return finished
        time.sleep(0.2)
    raise AssertionError(f"no stage was finished within {TIMEOUT_S} s")
