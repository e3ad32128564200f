"""Criteria that look at the model's own stream: batched, streamed and in a budget, with the same scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors.contracts import ModelRef, ModelSpec
from actors.errors import RequestError
from actors.models import LayerwisePass, load_model, load_streamed, text_config
from actors.models.families import experts_of
from actors.models.loading.checkpoint import read_checkpoint
from actors.scoring import CRITERIA, score_layers
from actors.scoring.criteria import LayerCriterion
from actors.scoring.measures.calibration import Calibration
from actors.scoring.measures.memory_budget import GIB, Costs, costs_of, plan_waves
from actors.scoring.measures.wavefront import ForwardCounter
from tests.support.tiny_models import blocks_of, tiny_ids, tiny_model, tiny_tokenizer
from tests.unit.scoring.plain import PLAIN

CPU = torch.device("cpu")
LENGTHS = (12, 7, 12, 3, 7, 12)
SEQUENCES = [tiny_ids(1, length, seed=seed)[0] for seed, length in enumerate(LENGTHS)]
BY_BLOCK = [name for name, row in CRITERIA.items() if isinstance(row, LayerCriterion) and row.by_block]
READS_TEXT = [name for name in BY_BLOCK if CRITERIA[name].uses_sequences]

GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5}
"""Experts that the file holds as the model does."""

DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

FAMILIES = {
    "llama": {},
    "gpt2": {},
    "gemma3_text": {},
    "bloom": {},
    "gpt_oss": GPT_OSS,
    "mixtral": {},
    "deepseek_v3": DEEPSEEK,
}


def _tight(model: PreTrainedModel) -> int:
    """The least budget that does: one of the longest sequences passes a block with a graph."""
    return costs_of(model).with_gradients().least(max(LENGTHS))


def test_those_are_all_that_do_not_compare_candidates() -> None:
    others = {"hidden_cosine", "perplexity", "kl", "task_metric", "laco", "fixed"}
    assert set(BY_BLOCK) == CRITERIA.keys() - others


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("num_remove", [1, 3])
@pytest.mark.parametrize("criterion", READS_TEXT)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe", "mixtral"])
def test_batches_have_the_scores_of_single_sequences(
    family: str, criterion: str, num_remove: int, tight: bool
) -> None:
    """Sequences of three lengths, some of which go together."""
    model = tiny_model(family)
    budget = _tight(model) if tight else None
    scores = score_layers(model, SEQUENCES, criterion, num_remove=num_remove, memory_budget=budget)
    want = PLAIN[criterion][0](model, model, SEQUENCES, num_remove)
    assert scores == pytest.approx(want, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_has_the_same_scores(family: str, tight: bool, tmp_path: Path) -> None:
    tiny_model(family, **FAMILIES[family]).save_pretrained(tmp_path, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))[0]
    budget = _tight(model) if tight else None
    for criterion in BY_BLOCK:
        streamed = load_streamed(ModelRef(ModelSpec(str(tmp_path))), CPU)
        want = score_layers(model, SEQUENCES, criterion, num_remove=2)
        found = score_layers(streamed, SEQUENCES, criterion, num_remove=2, memory_budget=budget)
        assert found == pytest.approx(want, rel=1e-6, abs=1e-9), criterion
        absent = all(p.is_meta for block in blocks_of(streamed) for p in block.parameters())
        assert absent, criterion


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def _times_read(criterion: str, directory: Path, budget: int | None = None) -> float:
    streamed = load_streamed(ModelRef(ModelSpec(str(directory))), CPU)
    score_layers(streamed, SEQUENCES, criterion, memory_budget=budget)
    stored = read_checkpoint(directory).tensors.items()
    return streamed.layer_stream.bytes_read / sum(t.num_bytes for name, t in stored if ".layers." in name)


@pytest.mark.parametrize("criterion", BY_BLOCK)
def test_how_often_a_block_is_read(criterion: str, saved: Path) -> None:
    """Taylor goes there and back."""
    want = {"taylor": 2, "deepest": 0, "reverse": 0, "random": 0}.get(criterion, 1)
    assert _times_read(criterion, saved) == want


def test_each_block_is_read_once_a_wave(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taylor, which adds up over all sequences, has one wave there and one back, whatever the budget."""
    streams_only = Costs(stream=128, working=1, pair=0, chunk_tokens=1024)
    monkeypatch.setattr("actors.scoring.measures.calibration.costs_of", lambda _model: streams_only)
    budget = 2 * 12 * 128
    planned = plan_waves(LENGTHS, (), streams_only, budget)
    # 12 + 12 + 12 + (7 + 3) + 7: not more than 12 tokens at one time.
    assert len(planned) >= 5
    for criterion in ("block_influence", "angular_block"):
        assert _times_read(criterion, saved, budget) == len(planned)
    assert _times_read("taylor", saved, _tight(tiny_model("llama"))) == 2


def test_states_that_do_not_fit_are_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The least budget has room for few of what the blocks receive; nothing is left behind."""
    monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / "cache"))
    written: list[str] = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: (written.append(file.name), save(state, file)))
    model = tiny_model("llama", num_hidden_layers=40)
    want = score_layers(model, SEQUENCES, "taylor")
    assert not written
    assert score_layers(model, SEQUENCES, "taylor", memory_budget=_tight(model)) == pytest.approx(want)
    assert written
    assert not list((tmp_path / "cache").iterdir())


def test_a_full_disk_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    model = tiny_model("llama", num_hidden_layers=40)
    with pytest.raises(RequestError, match=r"No space left .* raise scoring\.memory_budget_gb"):
        score_layers(model, SEQUENCES, "taylor", memory_budget=_tight(model))


@pytest.mark.parametrize("criterion", READS_TEXT)
def test_passes_are_counted(criterion: str) -> None:
    counter = ForwardCounter()
    row = CRITERIA[criterion]
    assert isinstance(row, LayerCriterion)
    row.measure(tiny_model("llama"), Calibration(SEQUENCES, counter=counter))
    assert counter.layer_forwards == row.forwards(6, len(SEQUENCES))


MOE = {"num_experts_per_tok": 2, "num_hidden_layers": 1, "hidden_size": 128}
EXPERTS_IN_BLOCKS = {
    "qwen3_moe": {"num_experts": 16, "moe_intermediate_size": 64, "mlp_only_layers": []} | MOE,
    "mixtral": {"num_local_experts": 16, "intermediate_size": 256} | MOE,
    "gpt_oss": GPT_OSS | {"num_local_experts": 16} | MOE,
    "jetmoe": {"num_local_experts": 16} | MOE,
    "llama4_text": {"num_local_experts": 16, "intermediate_size_mlp": 64} | MOE,
    "granitemoe": {"num_local_experts": 16} | MOE,
}


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", *EXPERTS_IN_BLOCKS])
def test_a_block_needs_no_more_than_its_costs_say(family: str, gradients: bool, experts: str) -> None:
    """Counted: all that a block allocates, alive at one time, beside the gradients of its weights."""
    overrides = EXPERTS_IN_BLOCKS.get(family) or {"num_hidden_layers": 1}
    model, ids_BT = tiny_model(family, **overrides), tiny_ids(4, 64)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(experts)
    costs = costs_of(model)
    layerwise = LayerwisePass(model, ids_BT)
    leaf_BTD = layerwise.hidden_BTD.detach().requires_grad_(gradients)

    def there_and_back() -> None:
        with torch.set_grad_enabled(gradients):
            output_BTD = layerwise.block(0, leaf_BTD)
        if gradients:
            torch.autograd.grad(output_BTD, leaf_BTD, torch.ones_like(output_BTD))

    costs = costs.with_gradients() if gradients else costs
    assert 0 < _peak(there_and_back) <= len(ids_BT) * costs.row(64)


def _peak(run: Callable[[], object]) -> int:
    """The most bytes that were allocated at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    taken, peak = 0, 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            taken += event.nbytes()
            peak = max(peak, taken)
    return peak


@pytest.mark.parametrize("criterion", READS_TEXT)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_scoring_keeps_its_budget(family: str, criterion: str) -> None:
    """Where sixteen sequences do not fit at once. With taylor the gradients of one block come on top."""
    model = tiny_model(family, hidden_size=64, intermediate_size=256, num_hidden_layers=12)
    sequences = [tiny_ids(1, 48, seed=seed)[0] for seed in range(16)]
    score_layers(model, sequences[:2], criterion)  # what a first call makes and keeps
    budget = 3 * costs_of(model).with_gradients().least(48) // 2
    if criterion == "bridge_residual":
        budget += 12 * 32 * 64**2
    block = sum(p.nbytes for p in blocks_of(model)[0].parameters())
    extra = 3 * block if criterion == "taylor" else 0
    peak = _peak(lambda: score_layers(model, sequences, criterion, memory_budget=budget))
    roomy = _peak(lambda: score_layers(model, sequences, criterion))
    assert peak <= budget + extra < roomy


def _experts(family: str, **fields: Any) -> tuple[int, int] | None:
    return experts_of(text_config(AutoConfig.for_model(family, **fields)))


@pytest.mark.parametrize(
    ("family", "fields", "want"),
    [
        ("mixtral", {}, (8, 2)),
        ("qwen2_moe", {}, (60, 4)),
        ("qwen3_moe", {}, (128, 8)),
        ("qwen3_next", {}, (512, 10)),
        ("qwen3_5_moe", {}, (256, 8)),
        ("deepseek_v2", {"n_routed_experts": 160, "num_experts_per_tok": 6}, (160, 6)),
        ("deepseek_v3", {}, (256, 8)),
        ("olmoe", {}, (64, 8)),
        ("dbrx", {"ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}}, (16, 4)),
        ("granitemoe", {}, (8, 2)),
        ("phimoe", {}, (16, 2)),
        ("gpt_oss", {}, (128, 4)),
        ("ernie4_5_moe", {}, (64, 6)),
        ("glm4_moe", {}, (128, 8)),
        ("minimax", {}, (8, 2)),
        ("jamba", {}, (16, 2)),
        ("kimi_linear", {}, (256, 8)),
        ("hunyuan_v1_moe", {"num_experts": 16, "moe_topk": [1, 2, 4]}, (16, 4)),
        ("gemma4_text", {"num_experts": 128, "top_k_experts": 8}, (128, 8)),
        # It multiplies every token by every expert's weight.
        ("llama4", {}, (16, 16)),
        ("llama", {}, None),
        ("granitemoehybrid", {"num_local_experts": 0}, None),
        # Not said: all count.
        ("deepseek_v2", {"num_experts_per_tok": None}, None),
    ],
)
def test_experts_that_a_token_passes(
    family: str, fields: dict[str, Any], want: tuple[int, int] | None
) -> None:
    assert _experts(family, **fields) == want


@pytest.mark.parametrize(("family", "least", "most"), [("deepseek_v3", 1.5, 4), ("mixtral", 0.5, 2)])
def test_a_large_model_of_experts(family: str, least: float, most: float) -> None:
    """GiB for a block on 2,048 tokens in bfloat16; DeepSeek-V3 would take 45 if all its experts counted."""
    config = AutoConfig.for_model(family, num_hidden_layers=4)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert least < costs_of(model).row(2048) / GIB < most
