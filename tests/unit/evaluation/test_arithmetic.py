"""The problems against a plain enumeration, the answers against one plain forward pass a problem."""

import re

import pytest
import torch

from actors.errors import RequestError
from actors.evaluation.probes.arithmetic import Problem, all_problems, answer_problems, draw_problems
from tests.support.tiny_models import tiny_llama, tiny_tokenizer

PROMPT = re.compile(r"Question: What is (\(([1-9]) [-+*] ([1-9])\) [-+*] ([1-9]))\?\nAnswer:")


def test_the_problems_are_all_those_that_one_digit_answers() -> None:
    problems = all_problems()
    expressions = [PROMPT.fullmatch(problem.prompt)[1] for problem in problems]  # type: ignore[index]
    assert [eval(expression) for expression in expressions] == [problem.answer for problem in problems]
    digits, signs = "123456789", "+-*"
    every = {
        f"({a} {p} {b}) {q} {c}" for a in digits for p in signs for b in digits for q in signs for c in digits
    }
    assert set(expressions) == {expression for expression in every if 0 <= eval(expression) <= 9}
    assert len(expressions) == len(set(expressions)) == 1847
    assert Problem("Question: What is (7 + 5) - 6?\nAnswer:", 6) in problems


def test_draws_are_repeatable_and_differ_by_seed() -> None:
    drawn = draw_problems(200)
    assert drawn == draw_problems(200)
    assert len(set(drawn)) == 200
    assert drawn != draw_problems(200, seed=1)
    assert len(draw_problems(10_000)) == 1847


def test_answers_are_those_of_a_forward_pass_for_each_problem() -> None:
    model, tokenizer = tiny_llama()
    problems = draw_problems(12)
    for answer, problem in zip(
        answer_problems(model, tokenizer, problems, batch_size=5), problems, strict=True
    ):
        ids = tokenizer(problem.prompt + " ").input_ids  # the tokenizer keeps the space apart from the digit
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        tokens = [tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
        digits = logits[tokens]
        assert answer.log_probability == pytest.approx(
            (digits[problem.answer] - digits.logsumexp(0)).item(), abs=1e-5
        )
        assert answer.log_probability_vocabulary == pytest.approx(
            (digits[problem.answer] - logits.logsumexp(0)).item(), abs=1e-5
        )
        assert answer.right == (digits.argmax().item() == problem.answer)


def test_a_digit_with_its_space_may_be_one_token() -> None:
    model, tokenizer = tiny_llama(vocab_size=320)
    plain = answer_problems(model, tokenizer, draw_problems(3))
    tokenizer.add_tokens([f" {digit}" for digit in range(10)])
    whole = answer_problems(model, tokenizer, draw_problems(3))
    assert [a.log_probability for a in plain] != [a.log_probability for a in whole]
    ids = tokenizer(draw_problems(3)[0].prompt).input_ids
    logits = model(torch.tensor([ids])).logits[0, -1]
    token = tokenizer.convert_tokens_to_ids(f" {draw_problems(3)[0].answer}")
    assert whole[0].log_probability_vocabulary == pytest.approx(
        logits.log_softmax(-1)[token].item(), abs=1e-5
    )


def test_a_tokenizer_without_digits_is_refused() -> None:
    model, _ = tiny_llama()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([": 7"])  # one answer is now shorter than the others
    with pytest.raises(RequestError, match="token of its own for each digit"):
        answer_problems(model, tokenizer, draw_problems(1))
