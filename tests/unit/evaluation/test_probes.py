"""Probes on a model in memory; what they measure is checked against plain generation."""

from pathlib import Path

import pytest
import torch

from actors.contracts import EvaluationSpec, ModelRef, ModelSpec
from actors.errors import RequestError
from actors.evaluation import PROBES, check_probes
from actors.evaluation.evaluate import evaluate
from actors.evaluation.probes.decoding import respond
from actors.evaluation.probes.degeneration import repetition, self_bleu
from actors.evaluation.probes.probes import PROMPTS
from tests.support.tiny_models import save_tiny, tiny_llama

MODEL = ModelRef(ModelSpec("unused"))
DOCS = Path(__file__).parents[3] / "docs/probes.md"
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.mark.parametrize("chat", [False, True])
def test_responses_are_those_of_one_prompt_at_a_time(chat: bool) -> None:
    model, tokenizer = tiny_llama()
    tokenizer.chat_template = TEMPLATE if chat else None
    prompts = ["The quick brown fox", "Ancient", "Stability of the higher layer leads to greater"]
    answers = respond(model, tokenizer, prompts, max_new_tokens=12, batch_size=2)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(f"<s>user: {prompt}\nassistant:" if chat else prompt).input_ids
        expected: list[int] = []
        while len(expected) < 12:
            token = model(torch.tensor([ids + expected])).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            expected.append(token)
        assert answer.tokens == tuple(expected)
        assert answer.finished == (len(expected) < 12)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_response_ends_where_the_model_ends_it() -> None:
    model, tokenizer = tiny_llama()
    (free,) = respond(model, tokenizer, ["The"], max_new_tokens=8)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free.tokens[3])
    (ended,) = respond(model, tokenizer, ["The"], max_new_tokens=8)
    assert ended.tokens == free.tokens[: free.tokens.index(free.tokens[3])]
    assert ended.finished
    assert not free.finished


def test_every_probe_gives_what_its_row_says(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama()
    spec = EvaluationSpec(
        model=MODEL,
        probes=tuple(PROBES),
        limit=3,
        max_new_tokens=6,
        allow_code_execution=True,
        assistant=ModelSpec(save_tiny(tmp_path)),
    )
    reported: list[tuple[int, int, str]] = []
    metrics = evaluate(model, tokenizer, spec, lambda *step: reported.append(step)).metrics
    assert [m.name for m in metrics] == [f"{name}/{gives}" for name in PROBES for gives in PROBES[name].gives]
    assert [step for step in reported if step[0] == step[1]] == [
        (3, 3, "prompts of degeneration, part 1 of 4"),
        (3, 3, "problems of arithmetic, part 2 of 4"),
        (3, 3, "prompts of code_failures, part 3 of 4"),
        (3, 3, "prompts of speculative, part 4 of 4"),
        (4, 4, "evaluated"),
    ]
    values = {metric.name: metric.value for metric in metrics}
    assert sum(values[f"code_failures/{name}"] for name in list(PROBES["code_failures"].gives)[:6]) == 1
    assert values["code_failures/cut_off"] == values["code_failures/unfinished"] == 1
    prompts = (PROMPTS / "instructions.txt").read_text().splitlines()[:3]
    texts = [answer.tokens for answer in respond(model, tokenizer, prompts, 6)]
    assert values["degeneration/repetition_4"] == pytest.approx(sum(map(repetition, texts)) / 3)
    assert values["degeneration/self_bleu_4"] == pytest.approx(self_bleu(texts))
    assert values["degeneration/mean_tokens"] == pytest.approx(sum(map(len, texts)) / 3)


def test_code_is_run_only_if_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "actors.evaluation.sandbox.runner.subprocess.Popen", lambda *_, **__: pytest.fail("ran")
    )
    model, tokenizer = tiny_llama()
    spec = EvaluationSpec(model=MODEL, probes=("code_failures",), limit=2, max_new_tokens=4)
    assert "code_failures/pass_at_1" not in {m.name for m in evaluate(model, tokenizer, spec).metrics}


def test_an_unknown_probe_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown probe 'arithmetics'; did you mean arithmetic"):
        check_probes(["arithmetics"])


def test_the_document_knows_every_probe_and_metric() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name, probe in PROBES.items():
        assert f"`{name}`" in text
        assert all(f"`{metric}`" in text for metric in probe.gives)
