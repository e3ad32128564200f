"""Speculative decoding against its plain form: token by token, without a cache, counted by hand."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from actors.contracts import EvaluationSpec, ModelRef, ModelSpec
from actors.errors import RequestError
from actors.evaluation.evaluate import evaluate
from actors.evaluation.probes.speculative import num_accepted, speculate
from actors.models import without_layers
from tests.support.tiny_models import save_tiny, tiny_llama, tiny_model, tiny_tokenizer
from tests.unit.cli.command import iterabre

PROMPTS = ["The quick brown fox", "Ancient deities are", "Stability of the higher layer"]
LENGTH, DRAFTED = 14, 3


def _likeliest(model: PreTrainedModel, ids: list[int]) -> int:
    return int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())


@torch.no_grad()
def _plain(
    verifier: PreTrainedModel, draft: PreTrainedModel, prompt: list[int], end: int
) -> tuple[list[int], int, int, int]:
    """Return the text, the verifier's forwards, and the tokens that were drafted and accepted."""
    text: list[int] = []
    forwards = drafted = accepted = 0
    while len(text) < LENGTH and end not in text:
        guess: list[int] = []
        while len(guess) < min(DRAFTED, LENGTH - len(text) - 1) and end not in guess:
            guess.append(_likeliest(draft, prompt + text + guess))
        forwards += 1
        drafted += len(guess)
        for token in guess:
            if len(text) == LENGTH or end in text:
                break
            right = _likeliest(verifier, prompt + text)
            text.append(right)
            if right != token:
                break
            accepted += 1
        else:
            if len(text) < LENGTH and end not in text:
                text.append(_likeliest(verifier, prompt + text))
    return text, forwards, drafted, accepted


@pytest.mark.parametrize("noise", [0.0, 0.01, 1.0])
def test_it_counts_what_the_plain_form_counts(noise: float) -> None:
    verifier, tokenizer = tiny_llama()
    draft = copy.deepcopy(verifier)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in draft.parameters():
            parameter += noise * torch.randn_like(parameter)
    found = speculate(verifier, draft, tokenizer, PROMPTS, LENGTH, DRAFTED)
    for prompt, got in zip(PROMPTS, found, strict=True):
        text, *counts = _plain(verifier, draft, tokenizer(prompt).input_ids, tokenizer.eos_token_id)
        assert [got.forwards, got.drafted, got.accepted] == counts
        assert (got.tokens, got.plain_tokens, got.same_text) == (len(text), len(text), True)
        assert min(got.seconds, got.plain_seconds) > 0
    rate = sum(each.accepted for each in found) / sum(each.drafted for each in found)
    assert {0.0: rate == 1, 0.01: 0.1 < rate < 0.95, 1.0: rate < 0.1}[noise], rate


def test_a_model_that_is_its_own_draft_takes_all_and_needs_one_pass_for_each_draft() -> None:
    model, tokenizer = tiny_llama()
    (found,) = speculate(model, model, tokenizer, PROMPTS[:1], max_new_tokens=12, num_assistant_tokens=5)
    assert (found.tokens, found.forwards, found.drafted, found.accepted) == (12, 2, 10, 10)


def test_drafted_tokens_count_up_to_the_first_that_differs() -> None:
    assert num_accepted([5, 6, 7, 8, 9], [[5, 6], [8, 1], [9]]) == 2 + 1 + 0
    assert num_accepted([5, 6, 2], [[5, 6, 2]]) == 3  # the end token was drafted
    assert num_accepted([5, 6], [[], []]) == 0


def test_a_pruned_model_drafts_for_its_source(tmp_path: Path) -> None:
    source = ModelSpec(save_tiny(tmp_path / "model"))
    model, tokenizer = tiny_llama()
    spec = EvaluationSpec(model=ModelRef(source), probes=("speculative",), limit=2, max_new_tokens=8)
    assert evaluate(model, tokenizer, spec).metrics == ()
    pruned = EvaluationSpec(
        model=ModelRef(source, dropped=(1,)), probes=("speculative",), limit=2, max_new_tokens=8
    )
    result = evaluate(without_layers(model, [1]), tokenizer, pruned)
    metrics = {metric.name: metric.value for metric in result.metrics}
    assert metrics["speculative/same_text"] == 1
    assert 1 <= metrics["speculative/tokens_per_forward"] <= 6
    assert 0 <= metrics["speculative/acceptance_rate"] <= 1


def test_the_command_takes_an_assistant(tmp_path: Path) -> None:
    model, draft = (save_tiny(tmp_path / name, layers) for name, layers in (("big", 4), ("small", 2)))
    answer = iterabre("evaluate", "--model", model, "--assistant", draft, "--limit", 1)
    assert answer.exit_code == 0, answer.err
    assert "acceptance_rate" in answer.out
    answer = iterabre("evaluate", "--model", model, "--probes", "speculative")
    assert (answer.exit_code, "--assistant" in answer.err) == (2, True)


def test_what_cannot_draft_is_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama()
    other = tiny_tokenizer()
    other.add_tokens(["new"])
    save_tiny(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    spec = EvaluationSpec(
        model=ModelRef(ModelSpec("unused")), probes=("speculative",), assistant=ModelSpec(f"{tmp_path}/other")
    )
    with pytest.raises(RequestError, match="a draft must write the same tokens"):
        evaluate(model, tokenizer, spec)
    mamba = tiny_model("mamba")
    with pytest.raises(RequestError, match="the state of a mamba model"):
        speculate(mamba, mamba, tokenizer, PROMPTS, 4, 2)
