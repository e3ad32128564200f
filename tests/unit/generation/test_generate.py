"""Responses: greedy ones are those of a plain loop, drawn ones follow the model, whatever the batch."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from actors.contracts import GenerationSpec, ModelSpec, TextSpec, no_progress
from actors.data import conversation_sequences
from actors.errors import RequestError
from actors.generation import generate_locally, generate_responses
from actors.generation.responses import FILE, Prompt, Response, Shard, run_shards
from actors.generation.transformers import GumbelDraw, end_tokens
from tests.support.tiny_models import save_tiny, tiny_llama, tiny_model, tiny_tokenizer

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
PROMPTS: list[Prompt] = [
    ({"role": "user", "content": "The lazy dog " * (i % 4 + 1) + f"number {i} ?"},) for i in range(9)
]
SPEC = GenerationSpec(
    model=ModelSpec("m"), prompts=TextSpec(chat_template="given"), max_new_tokens=12, batch_size=4
)


@pytest.fixture(autouse=True)
def template(tmp_path: Path) -> str:
    (tmp_path / "chat.jinja").write_text(CHAT)
    return str(tmp_path / "chat.jinja")


@pytest.fixture
def spec(template: str) -> GenerationSpec:
    return replace(SPEC, prompts=TextSpec(chat_template=template))


def often_ending() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model that ends some of its responses early."""
    model, tokenizer = tiny_llama(seed=3)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 4
    return model, tokenizer


def plain_greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: Prompt, num_tokens: int
) -> list[int]:
    """One sequence, one token at a time, no cache, no padding."""
    text = tokenizer.apply_chat_template(
        list(prompt), chat_template=CHAT, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < num_tokens and tokenizer.eos_token_id not in new:
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return new


def test_greedy_responses_are_those_of_a_plain_loop(spec: GenerationSpec) -> None:
    model, tokenizer = often_ending()
    responses = generate_responses(model, tokenizer, PROMPTS, spec)
    assert [r.prompt for r in responses] == PROMPTS
    for response in responses:
        ids = plain_greedy(model, tokenizer, response.prompt, 12)
        assert response.response == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert response.tokens == len(ids)
        assert response.finished == (ids[-1] == tokenizer.eos_token_id)
    assert {r.finished for r in responses} == {True, False}


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen2"])
def test_greedy_in_a_padded_batch_for_other_families(family: str, spec: GenerationSpec) -> None:
    """Absolute positions and sliding windows: left padding must not shift them."""
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    for response in generate_responses(model, tokenizer, PROMPTS, spec):
        ids = plain_greedy(model, tokenizer, response.prompt, 12)
        assert response.response == tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_drawn_responses_do_not_depend_on_batches_or_shares(spec: GenerationSpec, top_p: float) -> None:
    model, tokenizer = often_ending()
    drawn = replace(spec, temperature=0.7, top_p=top_p, responses_per_prompt=2, seed=4)
    whole = generate_responses(model, tokenizer, PROMPTS, drawn)
    one_by_one = generate_responses(model, tokenizer, PROMPTS, replace(drawn, batch_size=1))
    shares = [generate_responses(model, tokenizer, PROMPTS[a:b], drawn, a) for a, b in ((0, 2), (2, 9))]
    assert whole == one_by_one == [*shares[0], *shares[1]]
    assert [r.prompt for r in whole[::2]] == [r.prompt for r in whole[1::2]] == PROMPTS
    assert len({r.response for r in whole}) > 9
    assert generate_responses(model, tokenizer, PROMPTS, replace(drawn, seed=5)) != whole


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    count = 20_000
    draws = GumbelDraw(list(range(count)))(torch.empty(0), logits.expand(count, 4)).argmax(dim=1)
    frequencies = torch.tensor([Counter(draws.tolist())[i] / count for i in range(4)])
    # Four standard errors of a frequency near a half.
    torch.testing.assert_close(frequencies, logits.softmax(dim=0), atol=4 * 0.5 / count**0.5, rtol=0)


def test_a_nucleus_of_one_token_is_greedy(spec: GenerationSpec) -> None:
    model, tokenizer = often_ending()
    nucleus = replace(spec, temperature=1.0, top_p=1e-6)
    assert generate_responses(model, tokenizer, PROMPTS, nucleus) == generate_responses(
        model, tokenizer, PROMPTS, spec
    )


def test_prompts_without_room_for_a_response_are_left_out(spec: GenerationSpec) -> None:
    model, tokenizer = tiny_llama(max_position_embeddings=64)
    long = ({"role": "user", "content": "lazy dog " * 40},)
    responses = generate_responses(model, tokenizer, [PROMPTS[0], long, PROMPTS[1]], spec)
    assert [r.prompt for r in responses if r.left_out is None] == [PROMPTS[0], PROMPTS[1]]
    assert [(r.left_out, r.too_long) for r in responses[2:]] == [("longer than 52 tokens", True)]
    shorter = generate_responses(model, tokenizer, PROMPTS[:2], replace(spec, max_model_len=14))
    assert [r.too_long for r in shorter] == [True, True]


def test_all_tokens_that_end_a_turn_end_a_response() -> None:
    model, tokenizer = tiny_llama()
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id, 7, 9]


@pytest.fixture
def saved(tmp_path: Path, template: str) -> GenerationSpec:
    """A request as a campaign makes it: 70 prompts of a file, a model in a directory."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"q": f"Number {i} ?"}) + "\n" for i in range(70)))
    text = TextSpec(path=str(path), prompt_column="q", chat_template=template)
    return replace(SPEC, model=ModelSpec(save_tiny(tmp_path / "model")), prompts=text, max_new_tokens=3)


def test_responses_are_published_in_order_and_can_be_trained_on(
    saved: GenerationSpec, tmp_path: Path
) -> None:
    heard: list[tuple[int, int]] = []
    result = generate_locally(
        saved, str(tmp_path / "out"), lambda done, total, _: heard.append((done, total))
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / FILE).read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in rows] == [f"Number {i} ?" for i in range(70)]
    assert (result.num_prompts, result.num_responses) == (70, 70)
    assert result.num_tokens == sum(row["tokens"] for row in rows)
    assert result.num_finished == sum(row["finished"] for row in rows)
    assert heard == [(64, 70), (70, 70)]
    generated = TextSpec(generated=result.artifact, chat_template=saved.prompts.chat_template)
    answered = sum(bool(row["response"]) for row in rows)
    sequences = list(conversation_sequences(generated, tiny_tokenizer(), 64))
    assert len(sequences) == answered
    first = next(row for row in rows if row["response"])
    learnt = tiny_tokenizer().decode(sequences[0].ids[sequences[0].targets == 1], skip_special_tokens=True)
    assert learnt == first["response"]


def test_wrong_requests_are_reported(
    saved: GenerationSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blank.jsonl").write_text('{"q": " "}\n')
    monkeypatch.setitem(sys.modules, "vllm", None)
    cases = [
        (replace(saved, engine="vlm"), "unknown generation engine 'vlm'; did you mean vllm"),
        (replace(saved, engine="vllm"), r"vllm is not installed here.*openai"),
        (replace(saved, prompts=replace(saved.prompts, chat_template=None)), "has no chat template"),
        (
            replace(saved, prompts=replace(saved.prompts, path=str(tmp_path / "blank.jsonl"))),
            "no text in any row",
        ),
        (replace(saved, max_new_tokens=600), "all 70 prompts are too long"),
    ]
    for wrong, message in cases:
        with pytest.raises(RequestError, match=message):
            generate_locally(wrong, str(tmp_path / "out"))


def test_prompts_that_the_template_cannot_write_are_left_out_up_to_a_share(
    saved: GenerationSpec, tmp_path: Path
) -> None:
    picky = "{% if 'Number 3 ' in messages[0].content %}{{ raise_exception('not 3') }}{% endif %}" + CHAT
    (tmp_path / "chat.jinja").write_text(picky)
    spec = replace(saved, prompts=replace(saved.prompts, max_bad_rows=0.1))
    result = generate_locally(spec, str(tmp_path / "out"))
    assert (result.num_prompts, result.num_responses) == (70, 69)
    with pytest.raises(RequestError, match=r"prompt 3 of .*not 3.*1 of 70, more than max_bad_rows: 0\.01"):
        generate_locally(saved, str(tmp_path / "out2"))


def test_every_worker_gets_a_shard(saved: GenerationSpec, tmp_path: Path) -> None:
    sizes: list[int] = []

    def compute(shards: Sequence[Shard]) -> Iterator[tuple[Shard, list[Response]]]:
        for shard in shards:
            sizes.append(len(shard.prompts))
            yield shard, [Response(prompt, "x", True, 1) for prompt in shard.prompts]

    for engine, workers, expected in (
        ("vllm", 1, [70]),
        ("vllm", 4, [18, 18, 18, 16]),
        ("transformers", 1, [64, 6]),
    ):
        run_shards(replace(saved, engine=engine), compute, str(tmp_path / "o"), no_progress, workers)
        assert sizes == expected
        sizes.clear()
