"""The program of docs/adding_a_criterion.md runs as it stands there, and gives what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actors.models import load_model
from tests.support.tiny_models import blocks_of, save_tiny

ROOT = Path(__file__).parents[3]
TEXT = "The tower is high. " * 8


def test_the_page_s_program_runs_as_told(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "adding_a_criterion.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "output_norm.py").write_text(program)
    (tmp_path / "text.txt").write_text(TEXT)
    model_path = save_tiny(tmp_path / "model", num_layers=3)
    done = subprocess.run(
        [sys.executable, "output_norm.py", model_path, "text.txt"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = [float(line.split()[1]) for line in done.stdout.splitlines()]

    model, tokenizer = load_model(model_path, dtype="float32")
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids[:, :512]
    expected: list[float] = []

    def add(_block: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        expected.append(float((output - inputs[0])[0].norm(dim=-1).mean()))

    for block in blocks_of(model):
        block.register_forward_hook(add)
    with torch.no_grad():
        model(tokens, use_cache=False)
    assert printed == pytest.approx(expected, abs=1e-4)
