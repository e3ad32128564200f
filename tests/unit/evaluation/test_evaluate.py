"""A whole evaluation: names and units of the metrics, progress, requests refused before the model runs."""

import math
from pathlib import Path

import pytest

from actors.contracts import EvaluationSpec, ModelRef, ModelSpec, PerplexitySpec, TextSpec
from actors.data import load_texts, tokenize_text
from actors.errors import RequestError
from actors.evaluation import evaluate_model, token_perplexity
from actors.evaluation.evaluate import evaluate
from actors.evaluation.lm_eval.suites import SUITES, Suite
from tests.support.tiny_models import tiny_llama

TEXT = TextSpec(builtin="iterabre-appendix-a")
MODEL = ModelRef(ModelSpec("unused"))


def test_metrics_carry_names_units_and_versions() -> None:
    model, tokenizer = tiny_llama()
    text = PerplexitySpec("appendix", TEXT, context=64, max_tokens=300)
    spec = EvaluationSpec(model=MODEL, perplexity=(text,), tasks=("blimp_sample",), limit=4)
    reported: list[tuple[int, int, str]] = []
    result = evaluate(model, tokenizer, spec, progress=lambda *step: reported.append(step))
    expected = token_perplexity(model, tokenize_text(load_texts(TEXT), tokenizer, 300), context=64)
    assert [(m.name, m.unit) for m in result.metrics] == [
        ("appendix/token_perplexity", "ppl"),
        ("appendix/loss_nats", "nats"),
        ("appendix/loss_over_log_vocab", ""),
        ("blimp_sample/acc", ""),
    ]
    assert result.metrics[0].value == expected.perplexity
    assert result.metrics[1].value == expected.loss_nats
    assert result.metrics[2].value == expected.loss_nats / math.log(model.config.vocab_size)
    assert result.num_parameters == model.num_parameters()
    assert {"torch", "transformers", "lm_eval", "task:blimp_sample"} == set(dict(result.versions))
    windows, requests = "appendix, part 1 of 2", "blimp_sample, part 2 of 2"
    assert reported == [
        (0, 1, windows),
        (0, 5, f"windows of {windows}"),
        (4, 5, f"windows of {windows}"),
        (5, 5, f"windows of {windows}"),
        (0, 1, requests),
        (8, 8, f"log-likelihoods of {requests}"),
        (2, 2, "evaluated"),
    ]


def test_nothing_asked_for_measures_nothing() -> None:
    model, tokenizer = tiny_llama()
    assert evaluate(model, tokenizer, EvaluationSpec(model=MODEL)).metrics == ()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (EvaluationSpec(model=MODEL, tasks=("blimp_smaple",)), "blimp_sample"),
        (
            EvaluationSpec(model=MODEL, perplexity=(PerplexitySpec("x", TextSpec(builtin="x")),)),
            "built-in text",
        ),
    ],
)
def test_wrong_requests_are_refused_before_the_model_runs(spec: EvaluationSpec, message: str) -> None:
    model, tokenizer = tiny_llama()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(RequestError, match=message):
        evaluate(model, tokenizer, spec)


def test_missing_data_are_noticed_before_any_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n"
        "output_type: loglikelihood\ntest_split: test\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    spec = EvaluationSpec(
        model=ModelRef(ModelSpec("no such model")), tasks=("lost",), include_path=str(tmp_path)
    )
    with pytest.raises(RequestError, match=r"data of the tasks lost.*nowhere\.jsonl"):
        evaluate_model(spec)


def test_a_suite_gives_its_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "small", Suite({"blimp": "acc"}, "none"))
    spec = EvaluationSpec(
        model=MODEL, tasks=("blimp_sample",), suites=("small",), task_suffix="_sample", limit=4, max_length=64
    )
    task, suite = evaluate(*tiny_llama(), spec).metrics
    assert (suite.name, suite.value, suite.stderr) == ("small/mean", task.value, task.stderr)
