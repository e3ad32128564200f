"""benchmarks/gpu_check.py runs to its end on the CPU with a tiny model, where Ray cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_RAY = (
    "import sys, runpy; sys.modules['ray'] = None; sys.argv[0] = 'gpu_check';"
    "runpy.run_module('benchmarks.gpu_check', run_name='__main__')"
)


def test_every_check_runs_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_RAY, "--sizes", "tiny", "--json", str(tmp_path / "rows.json")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ITERABRE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["check"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert all(
        rows[f"{name} against CPU"]["note"] == "relative difference 0.0e+00" for name in ("scores", "losses")
    )
    skipped = {name for name, row in rows.items() if "skipped" in row["note"]}
    assert skipped == {"kd qlora"}
    measured = [row for name, row in rows.items() if name not in skipped and "against" not in name]
    assert len(measured) == 10
    assert all(row["tokens"] > 0 and row["seconds"] > 0 for row in measured)
    assert "kd lora" in done.stdout
