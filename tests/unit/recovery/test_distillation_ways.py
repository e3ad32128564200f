"""The ways that `benchmarks/distillation.py` compares give one loss: it compares equal work."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.support.tiny_models import save_tiny, tiny_ids

FILE = Path(__file__).parents[3] / "benchmarks" / "distillation_ways.py"


@pytest.fixture(scope="module")
def ways() -> ModuleType:
    described = importlib.util.spec_from_file_location("distillation_ways", FILE)
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


@pytest.mark.parametrize("objective", ["paper+attention", "kl"])
def test_all_ways_of_an_objective_have_one_loss(
    ways: ModuleType, objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ids_BT = save_tiny(tmp_path / "model", num_layers=8), tiny_ids()
    # The real file rounds to bfloat16, by which alone cached ways differ.
    monkeypatch.setattr(ways, "CACHE_DTYPE", torch.float32)
    case = ways.Case(path, "float32", objective, iteration=2, cut=4)
    ways.fill_cache(case, ids_BT, tmp_path)
    chosen = [way for way in ways.ways_of(objective, list(ways.WAYS)) if "compile" not in way]
    assert {"plain", "ours", "cut"} < set(chosen)
    losses = {}
    for way in chosen:
        loss = ways.build(way, case, tmp_path)(ids_BT)
        loss.backward()
        losses[way] = float(loss.detach())
    # Earlier adapters on the blocks below the cut are no part of ways that never had any there.
    at_the_cut = {way for way in losses if "cut" in way.split("+")}
    for group in (losses.keys() - at_the_cut, at_the_cut):
        values = [losses[way] for way in group]
        assert max(values) - min(values) <= 1e-5 * max(values), losses
