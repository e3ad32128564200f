"""The commands of docs/tutorial.md run as they stand there, in an empty directory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_models import save_tiny

ROOT = Path(__file__).parents[2]


def commands() -> str:
    """The ```bash blocks of the tutorial, in order, as one script."""
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def run_tutorial(directory: Path, model: str | None) -> str:
    """Run the tutorial in `directory`, with `model` as its `MODEL`; what it printed."""
    directory.mkdir()
    bin_directory = Path(sys.executable).parent
    path = os.pathsep.join([str(bin_directory), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    environment.pop("MODEL", None)
    if model:
        environment["MODEL"] = model
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands()],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tutorial_leads_from_an_empty_directory_to_a_model_that_generates(tmp_path: Path) -> None:
    # Thirty layers as SmolLM2 has, so that the tutorial's targets mean the same.
    printed = run_tutorial(tmp_path / "first", save_tiny(tmp_path / "model", num_layers=30))
    assert "29 layers: The tower is in" in printed
    numbers = json.loads((tmp_path / "first" / "numbers.json").read_text())["iterations"]
    assert [line["layers"] for line in numbers] == [30, 29, 28]
    assert (tmp_path / "first" / "runs" / "first" / "report" / "index.html").exists()


@pytest.mark.long
def test_the_tutorial_runs_with_its_own_model(tmp_path: Path) -> None:
    assert "29 layers: The tower is in" in run_tutorial(tmp_path / "first", None)
