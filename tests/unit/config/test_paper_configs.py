"""The papers' experiments as campaign files: each is valid, and says what its paper says."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from actors.contracts import ModelRef, ModelSpec, RecoverySpec, extend
from actors.evaluation import check_tasks
from actors.recovery import check_recovery, find_objective
from actors.scoring import find_criterion
from orchestrator.config import load_config
from orchestrator.execution.dry_run import campaign_stages
from orchestrator.planning.cost_model import parse_machine
from orchestrator.planning.estimate import plan_summary
from orchestrator.planning.planner import build_plan, evaluation_spec
from tests.support.tiny_models import tiny_tokenizer

FILES = sorted((Path(__file__).parents[3] / "configs" / "papers").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_method_can_be_asked_for(file: Path) -> None:
    """Criterion, objective, adapter, data columns and batch sizes go together."""
    config = load_config(file)
    assert config.name == file.stem
    for method in config.methods:
        find_criterion(method.scoring.criterion, method.scoring.pooling)
        find_objective(method.recovery.objective)
        assert method.scoring.calibration.streaming is False
        spec = extend(RecoverySpec, method.recovery, model=ModelRef(ModelSpec("x")))
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
    methods = _config("limits-upper-bound").methods
    for method in methods:
        assert method.schedule.layers_per_iteration == 1
        assert method.schedule.recover_at == "targets"
    trained = [(m.recovery.data.path, m.recovery.adapter.kind) for m in methods]
    assert trained == [
        ("openai/gsm8k", "qlora"),  # A.6.2
        ("allenai/Dolci-Instruct-SFT", "qlora"),  # A.6.3, against the next
        ("allenai/Dolci-Instruct-SFT", "full"),
    ]
    assert methods[0].recovery.generation.responses_per_prompt == 8


def test_gromov_measures_as_in_the_figures_and_appendix_a2() -> None:
    config = _config("gromov-figures")
    spec = evaluation_spec(config.evaluation, ModelSpec("x"), seed=0)
    assert dict(spec.num_fewshot) == {"mmlu": 5, "boolq": 0}
    (c4,) = spec.perplexity
    assert (c4.data.split, c4.max_tokens, c4.data.streaming) == ("validation[:60000]", None, False)
    assert config.methods[0].scoring.max_sequences == 10_000
    assert {model.id for model in config.models if model.trust_remote_code} == {"qwen-7b", "qwen-14b"}


LIMITS_SCORES = {
    "limits-table2": "hellaswag piqa mmlu winogrande openbookqa arc_easy arc_challenge "
    "gsm8k humaneval_plus_instruct mbpp_plus_instruct xsum",
    "limits-ratios-llama-3.1-8b-it": "gsm8k humaneval_plus_instruct mbpp_plus_instruct xsum",
    "limits-ratios-qwen2.5-7b-it": "gsm8k humaneval_plus_instruct mbpp_plus_instruct xsum",
    "limits-upper-bound": "gsm8k",
}


@pytest.mark.parametrize("name", LIMITS_SCORES)
def test_limits_measures_the_columns_of_its_tables_as_conversations(name: str) -> None:
    config = _config(name)
    spec = evaluation_spec(config.evaluation, ModelSpec("x"), seed=0)
    assert list(spec.tasks) == LIMITS_SCORES[name].split()
    assert all(method.recovery.batch_size == 8 for method in config.methods)
    assert all(method.recovery.warmup_steps == 50 for method in config.methods)
    assert spec.apply_chat_template
    assert spec.allow_code_execution == ("xsum" in spec.tasks)
    check_tasks(spec.tasks)


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}),
    "llama-3.2-3b": ("llama", {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}),
    "llama-3.2-1b": ("llama", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}),
    "qwen2.5-7b": ("qwen2", {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}),
    "qwen2.5-0.5b": ("qwen2", {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}),
}
"""Family and sizes, compared with the builders of pytorch/torchtune under torchtune/models: `llama3_1_8b`
(llama3_1, commit 1934adb), `llama3_2_3b` and `llama3_2_1b` (llama3_2, 2cb2470), `qwen2_5_7b_base` and
`qwen2_5_0_5b` (qwen2_5, 47a9e19). All of Llama-3.1-8B's but the width of the MLP is in Meta's own list, too
(models/sku_list.py of meta-llama/llama-models, 084b88e)."""

HEADS = {
    "llama-3.1-8b": {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-3.2-3b": {"num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-3.2-1b": {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "qwen2.5-7b": {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    "qwen2.5-0.5b": {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
}
"""From the same builders."""


def is_tied(name: str) -> bool:
    """Whether the head is the embedding; of Llama 3 by the `_component_builders.py` beside the builders."""
    return not name.endswith(("7b", "8b"))


def parameters(name: str) -> int:
    """Counted from the shape: gated MLP, grouped-query attention, two norms a block, one at the end."""
    family, sizes = SHAPES[name]
    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], HEADS[name]
    keys = hidden // heads["num_attention_heads"] * heads["num_key_value_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * keys + (hidden + 2 * keys) * (family == "qwen2")  # biases
    block = attention + 3 * hidden * inner + 2 * hidden
    embeddings = heads["vocab_size"] * hidden * (1 if is_tied(name) else 2)
    return embeddings + sizes["num_hidden_layers"] * block + hidden


def paper_model(hub: Path, name: str) -> str:
    """Put into the hub's cache what a plan reads of the model of that name, which is not its weights."""
    family, sizes = SHAPES[name]
    config = AutoConfig.for_model(family, **sizes, **HEADS[name], tie_word_embeddings=is_tied(name))
    commit = "0" * 40
    place = hub / f"models--papers--{name}"
    config.save_pretrained(place / "snapshots" / commit)
    tiny_tokenizer().save_pretrained(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    return f"papers/{name}"


def test_table_1_is_planned_for_the_papers_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog .\n" * 3000)
    settings = [f"models.{i}.path={paper_model(tmp_path, name)}" for i, name in enumerate(SHAPES)]
    settings.append(f"methods.0.recovery.data={{path: {text}}}")
    config = load_config(next(file for file in FILES if file.stem == "iterabre-table1"), settings)
    plan = build_plan(config)
    assert [model.id for model in config.models] == list(SHAPES)
    sizes = {t.model_id: t.model.num_parameters for t in plan.trajectories}
    assert sizes == {name: parameters(name) for name in SHAPES}
    left = {
        t.model_id: t.iterations[-1].layers_left for t in plan.trajectories if t.method.name == "iterabre"
    }
    assert list(left.values()) == [24, 21, 12, 21, 18]  # IteRABRe, Table 1
    machines = [parse_machine(text, config.cost) for text in ("8xH100-80G", "2xA100-80G")]
    rows = plan_summary(plan, config, machines, campaign_stages(plan))["machines"]
    assert [row["fits"] for row in rows] == [True, True]
