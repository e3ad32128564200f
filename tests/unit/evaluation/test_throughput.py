"""Throughput: what is timed and counted, with the clock in the test's hand."""

import pytest
import torch

from actors.contracts import EvaluationSpec, ModelRef, ModelSpec, ThroughputSpec
from actors.errors import RequestError
from actors.evaluation.evaluate import evaluate
from actors.evaluation.throughput import WARM_UPS, measure_speed, throughput
from actors.models import without_layers
from tests.support.tiny_models import save_tiny, tiny_ids, tiny_llama

SPEC = ThroughputSpec(context=16, new_tokens=4, batch_size=2, repeats=3)


def _clock(monkeypatch: pytest.MonkeyPatch, models: list[torch.nn.Module]) -> None:
    """Time in which every block that a token batch passes takes one second."""
    seconds = [0.0]
    monkeypatch.setattr("actors.evaluation.throughput._now", lambda _cuda: seconds[0])
    for model in models:
        for block in model.model.layers:
            block.register_forward_hook(lambda *_: seconds.__setitem__(0, seconds[0] + 1))


def test_speed_counts_tokens_over_median_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, _ = tiny_llama(4)
    pruned = without_layers(dense, [1])
    _clock(monkeypatch, [dense, pruned])
    ids = tiny_ids(1, 40)[0]
    slow, fast = measure_speed([dense, pruned], ids, SPEC)
    assert slow.prefill_tokens_per_second == pytest.approx(2 * 16 / 4)
    assert slow.decode_tokens_per_second == pytest.approx(2 * 4 / (4 * 4))
    assert fast.decode_tokens_per_second == pytest.approx(2 * 4 / (4 * 3))
    metrics = {m.name.removeprefix("throughput/"): m.value for m in throughput(pruned, dense, ids, SPEC)}
    assert metrics["speedup"] == pytest.approx(4 / 3)
    assert metrics["prefill_speedup"] == pytest.approx(4 / 3)
    assert metrics["peak_memory_ratio"] == fast.peak_bytes / slow.peak_bytes < 1


def test_memory_is_weights_and_a_full_cache() -> None:
    model, _ = tiny_llama(3)
    (speed,) = measure_speed([model], tiny_ids(1, 40)[0], SPEC)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert speed.weight_bytes == 4 * model.num_parameters() + buffers
    head_dim, kv_heads, layers, tokens = 8, 2, 3, 16 + 4
    assert speed.cache_bytes == 2 * 2 * layers * kv_heads * head_dim * tokens * 4
    assert speed.peak_bytes == speed.weight_bytes + speed.cache_bytes


def test_progress_counts_runs_of_all_models() -> None:
    reported: list[tuple[int, int, str]] = []
    models = [tiny_llama(2)[0], tiny_llama(3)[0]]
    measure_speed(models, tiny_ids(1, 40)[0], SPEC, lambda *step: reported.append(step))
    runs = 2 * (WARM_UPS + SPEC.repeats)
    assert reported == [(done, runs, "runs") for done in range(runs + 1)]


def test_an_evaluation_measures_a_pruned_model_beside_its_source(tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = ModelRef(ModelSpec(save_tiny(tmp_path / "model", 4)))
    model, tokenizer = tiny_llama(4)
    dense = evaluate(model, tokenizer, EvaluationSpec(model=source, throughput=SPEC))
    pruned = evaluate(
        without_layers(model, [0, 1, 2]),
        tokenizer,
        EvaluationSpec(model=source.without((0, 1, 2)), throughput=SPEC),
    )
    before, after = ({m.name: m.value for m in result.metrics} for result in (dense, pruned))
    assert before["throughput/speedup"] == 1
    assert after["throughput/speedup"] > 1
    assert after["throughput/kv_cache"] == before["throughput/kv_cache"] / 4


@pytest.mark.parametrize(
    ("spec", "tokens", "message"),
    [
        (ThroughputSpec(context=510, new_tokens=4), 600, "510 .* 4 tokens is more than the 512 positions"),
        (ThroughputSpec(context=16, batch_size=3), 47, "the text has only 47"),
    ],
)
def test_what_cannot_be_measured_is_refused(spec: ThroughputSpec, tokens: int, message: str) -> None:
    model, _ = tiny_llama()
    with pytest.raises(RequestError, match=message):
        measure_speed([model], tiny_ids(1, tokens)[0], spec)
