"""All candidates in one layerwise pass, against running the whole model once for each."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.models import LayerwisePass
from actors.scoring.measures.activations import hidden_cosine, perplexity
from actors.scoring.measures.calibration import Calibration
from actors.scoring.measures.memory_budget import CHUNK_TOKENS, Costs, costs_of
from actors.scoring.measures.wavefront import (
    UNPRUNED,
    ForwardCounter,
    last_hiddens,
    layer_forwards,
    wavefront,
    waves,
)
from tests.support.tiny_models import blocks_of, skipped, tiny_ids, tiny_model


def _candidate_hidden(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    """Return the last hidden states of the model, and of the model without each block. [1 + N, T, D]"""
    (wave,) = waves(model, [ids_T], budget=2**62)
    found = wavefront(model, [ids_T], wave, keep_unpruned=True, counter=ForwardCounter())
    return torch.cat([states.last_hidden()[:, 0] for states in found])


@torch.no_grad()
def _whole_model(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    return model(ids_T[None], output_hidden_states=True, use_cache=False).hidden_states[-1][0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "qwen3_moe", "smollm3"])
def test_every_candidate_equals_a_run_of_its_own(family: str) -> None:
    model, ids_T = tiny_model(family), tiny_ids(1)[0]
    hidden = _candidate_hidden(model, ids_T)
    assert hidden.shape == (7, 12, 32)
    torch.testing.assert_close(hidden[0], _whole_model(model, ids_T))
    for layer in range(6):
        with skipped(model, [layer]):
            torch.testing.assert_close(hidden[1 + layer], _whole_model(model, ids_T))


def test_last_hidden_is_after_the_final_norm() -> None:
    model, ids_T = tiny_model("llama"), tiny_ids(1)[0]
    torch.testing.assert_close(last_hiddens(model, [ids_T])[0], _whole_model(model, ids_T))


def test_layer_forwards_are_counted_right() -> None:
    """Counted inside the blocks, where only real computation comes; the LM head never runs."""
    model, sequences = tiny_model("llama"), [tiny_ids(1, length)[0] for length in (12, 5, 1)]
    # The first pass over a family's blocks runs one block on one token to see what it returns.
    LayerwisePass(model, sequences[0][None])
    rows, heads = [], []
    for block in blocks_of(model):
        block.mlp.register_forward_hook(lambda _mlp, inputs, _output: rows.append(len(inputs[0])))
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    for ids_T in sequences:
        _candidate_hidden(model, ids_T)
    assert rows == [1, 2, 3, 4, 5, 6] * 3
    assert sum(rows) == 3 * 6 * 7 // 2 == layer_forwards(6, 3)
    assert not heads


def test_no_gradients_are_kept() -> None:
    model, sequences = tiny_model("llama"), [tiny_ids(1)[0]]
    assert not last_hiddens(model, sequences)[0].requires_grad
    for measure in (hidden_cosine, perplexity):
        assert not measure(model, Calibration(sequences)).requires_grad


LENGTHS = (12, 5, 12, 5, 12, 12, 1)


def _pass_through(
    model: PreTrainedModel, candidates: list[int], budget: int | None
) -> dict[tuple[int, int], Tensor]:
    """Last hidden state of every sequence and stream."""
    sequences = [tiny_ids(1, length, seed=seed)[0] for seed, length in enumerate(LENGTHS)]
    found: dict[tuple[int, int], Tensor] = {}
    for wave in waves(model, sequences, candidates, budget):
        for states in wavefront(model, sequences, wave, keep_unpruned=True, counter=ForwardCounter()):
            with torch.no_grad():
                hidden_SGTD = states.last_hidden()
            for s, stream in enumerate(states.streams):
                for g, position in enumerate(states.positions):
                    found[position, stream] = hidden_SGTD[s, g]
    return found


@pytest.mark.parametrize("candidates", [[0, 1, 2, 3, 4, 5], [1, 4], [5], []])
@pytest.mark.parametrize("budget", [None, 100_000, 20_000, 8_000])
@pytest.mark.parametrize("family", ["llama", "gemma4_text", "bloom"])
def test_many_sequences_in_portions(
    family: str, budget: int | None, candidates: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever shares a batch, each sequence comes out as if it were alone."""
    cheap_blocks = Costs(stream=128, working=100, pair=0, chunk_tokens=1024)
    monkeypatch.setattr("actors.scoring.measures.wavefront.costs_of", lambda _model: cheap_blocks)
    model = tiny_model(family)
    found = _pass_through(model, candidates, budget)
    assert set(found) == {(p, s) for p in range(len(LENGTHS)) for s in (UNPRUNED, *candidates)}
    for position, length in enumerate(LENGTHS):
        alone = _candidate_hidden(model, tiny_ids(1, length, seed=position)[0])
        for stream in (UNPRUNED, *candidates):
            torch.testing.assert_close(found[position, stream], alone[1 + stream])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, ids_T = tiny_model("llama"), tiny_ids(1)[0]
    want = _candidate_hidden(model, ids_T)
    got = _candidate_hidden(model.to(dtype), ids_T)
    assert got.dtype == dtype
    assert torch.cosine_similarity(got.float().flatten(1), want.flatten(1)).min() > 0.999


def _observed(model: PreTrainedModel, budget: int | None) -> list[tuple[int, int]]:
    """Rows and tokens of everything that enters a block's matrix products."""
    seen: list[tuple[int, int]] = []
    for block in blocks_of(model):
        block.mlp.register_forward_hook(lambda _mlp, inputs, _output: seen.append(inputs[0].shape[:2]))
    _pass_through(model, list(range(6)), budget)
    return seen


def test_rows_in_a_block_keep_the_budget() -> None:
    model = tiny_model("llama")
    costs = costs_of(model)
    roomy, tight = _observed(model, None), _observed(tiny_model("llama"), 200_000)
    assert max(rows * costs.row(tokens) for rows, tokens in tight) <= 100_000
    assert max(rows for rows, _ in tight) < max(rows for rows, _ in roomy)


def test_streams_between_blocks_keep_the_budget() -> None:
    model = tiny_model("llama")
    costs = costs_of(model)
    sequences = [tiny_ids(1, length)[0] for length in LENGTHS]
    planned = waves(model, sequences, budget=80_000)
    assert len(planned) > 1
    for wave in planned:
        tokens = sum(LENGTHS[i] for i in wave.positions)
        assert tokens * (1 + len(wave.candidates)) * costs.stream <= 40_000


def test_a_block_needs_no_more_than_its_costs_say() -> None:
    """Counted: all that the operations inside a block of a wide model allocate, alive at one time."""
    config = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 1}
    model = tiny_model("llama", **config)
    ids = tiny_ids(4, 64)
    layerwise = LayerwisePass(model, ids)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.no_grad():
        layerwise.block(0, layerwise.hidden_BTD)
    taken, peak = 0, 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            taken += event.nbytes()
            peak = max(peak, taken)
    assert 0 < peak <= len(ids) * costs_of(model).row(64)


def test_a_budget_too_small_is_refused_with_the_size_that_would_do() -> None:
    sequences = [tiny_ids(1, 12)[0]]
    with pytest.raises(RequestError, match=r"for 12 tokens; it needs .*scoring\.memory_budget_gb"):
        waves(tiny_model("llama"), sequences, budget=1000)


def test_short_sequences_fill_a_block() -> None:
    """No padding, and sequences of one length as many together as make a product efficient."""
    model = tiny_model("llama")
    sequences = [tiny_ids(1, 256)[0]] * 10 + [tiny_ids(1, 40)[0]] * 3
    (wave,) = waves(model, sequences)
    at_once = CHUNK_TOKENS["cpu"] // 256
    assert [len(group.positions) for group in wave.groups] == [at_once, at_once, 10 - 2 * at_once, 3]
    assert sorted(wave.positions) == list(range(13))


def test_eager_attention_costs_pairs_of_tokens() -> None:
    assert costs_of(tiny_model("llama")).pair == 0
    assert costs_of(tiny_model("llama", attn_implementation="eager")).pair == 4 * (4 + 8)
    assert Costs(stream=1, working=10, pair=2, chunk_tokens=100).row(5) == 5 * 10 + 25 * 2


def test_last_hiddens_keep_the_order_of_the_sequences() -> None:
    model = tiny_model("llama")
    sequences = [tiny_ids(1, length, seed=seed)[0] for seed, length in enumerate(LENGTHS)]
    counter = ForwardCounter()
    for ids_T, hidden in zip(sequences, last_hiddens(model, sequences, counter=counter), strict=True):
        torch.testing.assert_close(hidden, _whole_model(model, ids_T))
    assert counter.layer_forwards == 6 * len(LENGTHS)
