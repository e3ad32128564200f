"""The papers' experiments as campaign files: each is valid, and says what its paper says."""

from pathlib import Path
from typing import Any

import pytest

from actors.contracts import ModelRef, ModelSpec
from actors.recovery import check_recovery, find_objective
from actors.scoring import find_criterion
from orchestrator.config import load_config
from orchestrator.specs import recovery_spec, text_spec

FILES = sorted((Path(__file__).parents[3] / "configs" / "papers").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_method_can_be_asked_for(file: Path) -> None:
    """Criterion, objective, adapter, data columns and batch sizes go together."""
    config = load_config(file)
    assert config.name == file.stem
    for method in config.methods:
        find_criterion(method.scoring.criterion, method.scoring.pooling)
        find_objective(method.recovery.objective)
        assert text_spec(method.scoring.calibration).streaming is False
        spec = recovery_spec(ModelRef(ModelSpec("x")), method, seed=0)
        check_recovery(spec, workers=config.execution.training.workers)


def _config(name: str) -> Any:
    return load_config(next(file for file in FILES if file.stem == name))


def test_iterabre_is_as_in_section_4() -> None:
    recovery = _config("iterabre-table1").methods[0].recovery
    assert (recovery.adapter.kind, recovery.adapter.rank, recovery.learning_rate) == ("lora", 32, 1e-4)
    assert (recovery.micro_batch_size, recovery.batch_size, recovery.sequence_length) == (4, 32, 512)


def test_gromov_has_rank_and_rate_of_each_model() -> None:
    """Appendix A.1, second table; 5000 steps of 16 sequences."""
    config = _config("gromov-figures")
    healing = config.methods[0].recovery
    table = {}
    for model in config.models:
        own = model.overrides.recovery
        rank = own.get("adapter", {}).get("rank", healing.adapter.rank)
        length = own.get("sequence_length", healing.sequence_length)
        tokens = own.get("max_tokens", healing.max_tokens)
        assert tokens == 5000 * 16 * length
        table[model.id] = (rank, own.get("learning_rate", healing.learning_rate), length)
    assert table == {
        "llama-2-7b": (2, 3e-4, 2048),
        "llama-2-13b": (64, 3e-4, 4096),
        "llama-2-70b": (8, 3e-5, 4096),
        "mistral-7b": (4, 3e-6, 2048),
        "phi-2": (64, 2e-4, 2048),
        "qwen-7b": (64, 3e-4, 2048),
        "qwen-14b": (64, 3e-4, 4096),
    }
    assert (healing.lr_schedule, healing.warmup_steps, healing.adapter.dropout) == ("cosine", 100, 0.05)


def test_the_upper_bound_chooses_greedily_and_recovers_once() -> None:
    for method in _config("limits-upper-bound").methods:
        assert method.schedule.layers_per_iteration == 1
        assert method.schedule.recover_at == "targets"
        assert method.recovery.generation.responses_per_prompt == 8
