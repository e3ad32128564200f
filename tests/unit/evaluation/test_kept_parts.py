"""An evaluation that was interrupted goes on from what it has kept, with the same numbers."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from actors.artifacts import list_files
from actors.contracts import EvaluationSpec, Metric, ModelRef, ModelSpec, PerplexitySpec, TextSpec
from actors.evaluation import kept_parts
from actors.evaluation.evaluate import evaluate
from actors.evaluation.kept_parts import KeptParts, KeptResponses
from tests.support.tiny_models import tiny_llama

SPEC = EvaluationSpec(
    model=ModelRef(ModelSpec("unused")),
    perplexity=(
        PerplexitySpec("appendix", TextSpec(builtin="iterabre-appendix-a"), context=64, max_tokens=300),
    ),
    tasks=("blimp_sample",),
    probes=("arithmetic",),
    limit=60,
)


class Killed(BaseException):
    """As a killed process: nothing catches it."""


def _tokens_of(model: PreTrainedModel, call: Callable[[], Any]) -> int:
    """Return how many tokens the model computes in a call."""
    counted = 0

    def count(_module: Any, arguments: Any, named: dict[str, Any]) -> None:
        nonlocal counted
        counted += (arguments[0] if arguments else named["input_ids"]).numel()

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return counted


@pytest.mark.parametrize("killed_at", ["log-likelihoods of blimp_sample", "problems of arithmetic"])
def test_after_a_kill_only_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    monkeypatch.setattr(kept_parts, "REQUESTS_AT_ONCE", 25)
    torch.manual_seed(0)
    model, tokenizer = tiny_llama()
    kept = KeptParts(str(tmp_path / "parts"))
    calls: list[tuple[int, int]] = []

    def killing(done: int, total: int, what: str = "") -> None:
        if killed_at in what:
            calls.append((done, total))
            if done > total / 2:
                raise Killed

    whole = evaluate(model, tokenizer, SPEC)
    with pytest.raises(Killed):
        evaluate(model, tokenizer, SPEC, killing, kept=kept)
    assert calls == sorted(calls), "counts all requests, not those of a piece"
    resumed: list[Any] = []
    rest = _tokens_of(model, lambda: resumed.append(evaluate(model, tokenizer, SPEC, kept=kept)))
    assert rest < 0.75 * _tokens_of(model, lambda: evaluate(model, tokenizer, SPEC))
    for metric, expected in zip(resumed[0].metrics, whole.metrics, strict=True):
        assert metric.name == expected.name
        assert metric.value == pytest.approx(expected.value, rel=1e-5)
    again = _tokens_of(model, lambda: resumed.append(evaluate(model, tokenizer, SPEC, kept=kept)))
    assert again == 0
    assert resumed[1] == resumed[0]


def test_responses_are_known_by_their_requests(tmp_path: Path) -> None:
    parts = KeptParts(str(tmp_path))
    requests: list[tuple[Any, ...]] = [("a", {"until": ["\n"]}), ("b", {}), ("a", {"until": ["\n"]})]
    first = KeptResponses(parts, "generate_until", requests)
    first.add([2, 1], ["third", "second"])
    second = KeptResponses(parts, "generate_until", [("c", {}), *requests])
    assert second.missing == [0, 1], "the same request, made twice, has a response each"
    second.add([0, 1], ["new", "first"])
    assert second.in_order() == ["new", "first", "second", "third"]
    assert KeptResponses(parts, "loglikelihood", requests).missing == [0, 1, 2]
    assert list(KeptResponses(parts, "generate_until", []).pieces()) == []
    pair = KeptResponses(parts, "loglikelihood", [("x", " y")])
    pair.add([0], [(-1.5, True)])
    assert KeptResponses(parts, "loglikelihood", [("x", " y")]).in_order() == [(-1.5, True)]


def test_a_damaged_part_is_measured_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = KeptParts(str(tmp_path))
    metrics = [Metric("text/token_perplexity", 12.5, "ppl")]
    assert parts.metrics("text", lambda: metrics) == metrics
    (file,) = list_files(parts.uri or "")
    Path(file.path).write_text("[{")
    with caplog.at_level(logging.WARNING):
        assert parts.metrics("text", lambda: metrics) == metrics
    assert "is measured again" in caplog.text
    assert parts.metrics("text", lambda: pytest.fail("it is kept")) == metrics
