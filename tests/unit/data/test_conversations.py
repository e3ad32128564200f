"""Conversations: what is learnt, reported by the text of the tokens; what is refused and what is skipped."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from actors.artifacts import publish
from actors.contracts import TextSpec
from actors.data import chat_template, conversation_sequences, read_prompts
from actors.errors import RequestError
from tests.support.tiny_models import tiny_tokenizer

CHAT = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<s>system\nBe brief.</s>\n{% endif %}"
    "<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + MARKED
)

TURNS = [
    {"role": "user", "content": "Who is lazy ?"},
    {"role": "assistant", "content": "The dog – é ."},
    {"role": "user", "content": "Who is quick ?"},
    {"role": "assistant", "content": " The fox ."},
]


def chatty(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def learnt(spec: TextSpec, tokenizer: PreTrainedTokenizerFast, length: int = 512) -> list[str]:
    """The text of the targets of each sequence."""
    return [
        tokenizer.decode(s.ids[s.targets.astype(bool)])
        for s in conversation_sequences(spec, tokenizer, length)
    ]


def texts(spec: TextSpec, tokenizer: PreTrainedTokenizerFast, length: int = 512) -> list[str]:
    return [tokenizer.decode(s.ids) for s in conversation_sequences(spec, tokenizer, length)]


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_only_answers_and_their_ends_are_learnt(tmp_path: Path, template: str) -> None:
    tokenizer = chatty(template)
    spec = TextSpec(path=write(tmp_path / "a.jsonl", {"messages": TURNS}), messages_column="messages")
    assert learnt(spec, tokenizer) == ["The dog – é .</s> The fox .</s>"]
    assert texts(spec, tokenizer) == [tokenizer.apply_chat_template(TURNS, tokenize=False)]


def test_instruction_input_and_output_are_a_conversation(tmp_path: Path) -> None:
    tokenizer = chatty()
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "Translate", "input": "le chien", "output": "the dog"},
        {"instruction": "Say hi", "input": "", "output": "hi"},
        {"instruction": "Say ho", "input": None, "output": "ho"},
    )
    spec = TextSpec(path=path, prompt_column="instruction", input_column="input", response_column="output")
    assert learnt(spec, tokenizer) == ["the dog</s>", "hi</s>", "ho</s>"]
    head = "<s>system\nBe brief.</s>\n<s>user\n"
    assert texts(spec, tokenizer)[0] == f"{head}Translate\n\nle chien</s>\n<s>assistant\nthe dog</s>\n"
    assert texts(spec, tokenizer)[1] == f"{head}Say hi</s>\n<s>assistant\nhi</s>\n"
    assert read_prompts(spec, limit=2) == [
        ({"role": "user", "content": "Translate\n\nle chien"},),
        ({"role": "user", "content": "Say hi"},),
    ]


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_generated_responses_are_learnt_alone_and_unfinished_ones_have_no_end(
    tmp_path: Path, template: str
) -> None:
    directory = tmp_path / "out"
    directory.mkdir()
    write(
        directory / "part-00000.jsonl",
        {"prompt": TURNS[:3], "response": "The fox .", "finished": True, "tokens": 4},
        {"prompt": TURNS[:1], "response": "The dog and", "finished": False, "tokens": 4},
    )
    write(
        directory / "part-00001.jsonl",
        {"prompt": TURNS[:1], "response": "A dog .", "finished": True, "tokens": 4},
    )
    spec = TextSpec(generated=publish(directory, str(tmp_path / "published")))
    assert learnt(spec, chatty(template)) == ["The fox .</s>", "The dog and", "A dog .</s>"]
    assert texts(spec, chatty(template))[1].endswith("assistant\nThe dog and")


def test_prompts_are_conversations_without_their_last_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"m": TURNS}, {"m": TURNS[:1]}, {"m": [TURNS[1]]})
    assert read_prompts(TextSpec(path=path, messages_column="m")) == [tuple(TURNS[:3]), tuple(TURNS[:1])]


def test_what_is_too_long_is_cut_and_what_has_no_answer_is_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = chatty(MARKED)
    path = write(
        tmp_path / "a.jsonl",
        {"q": "Hi", "a": "The quick brown fox jumps over the lazy dog ."},
        {"q": "The quick brown fox jumps over the lazy dog . " * 5, "a": "yes"},
        {"q": "Hi", "a": "  "},
    )
    spec = TextSpec(path=path, prompt_column="q", response_column="a")
    with caplog.at_level(logging.WARNING):
        (cut,) = conversation_sequences(spec, tokenizer, 24)
    assert len(cut.ids) == 24
    assert "The quick brown fox".startswith(tokenizer.decode(cut.ids[cut.targets == 1])[:19])
    assert "2 of 3 conversations skipped" in caplog.text
    with pytest.raises(RequestError, match=r"none of the 3 conversations has an answer within 3 tokens"):
        list(conversation_sequences(spec, tokenizer, 3))


def test_a_model_without_chat_format_needs_a_template(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"q": "Who ?", "a": "The dog ."})
    spec = TextSpec(path=path, prompt_column="q", response_column="a")
    bare = chatty(None)
    bare.name_or_path = "some-base-model"
    with pytest.raises(RequestError, match=r"'some-base-model' has no chat template.*data\.chat_template"):
        list(conversation_sequences(spec, bare, 64))
    plain = TextSpec(path=path, prompt_column="q", response_column="a", chat_template="plain")
    assert texts(plain, bare) == ["User: Who ?\n\nAssistant: The dog .</s>\n\n"]
    assert learnt(plain, bare) == [" The dog .</s>"]
    (tmp_path / "own.jinja").write_text(CHAT)
    own = TextSpec(
        path=path, prompt_column="q", response_column="a", chat_template=str(tmp_path / "own.jinja")
    )
    assert learnt(own, bare) == ["The dog .</s>"]
    assert chat_template(bare, own) == CHAT


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (FORGETFUL, TURNS, "changes earlier turns"),
        (
            NO_SYSTEM,
            [{"role": "system", "content": "x"}, *TURNS],
            r"row 0 of '.*a\.jsonl': .*\(system, user, .*no system role",
        ),
        ("{{ messages[0].nothing.at_all }}", TURNS, r"row 0 of '.*a\.jsonl': "),
        ("{{ 'a' + 1 }}", TURNS, r"row 0 of '.*a\.jsonl': .*cannot read it"),
        (CHAT, [], r"row 0 of column 'm' is no list of messages"),
        (CHAT, [{"role": "user"}], r"row 0 of column 'm' is no list of messages"),
        (CHAT, "hello", r"row 0 of column 'm' is no list of messages"),
        (CHAT, TURNS[:1], "none of the 1 conversations"),
    ],
)
def test_conversations_that_cannot_be_written_are_reported(
    tmp_path: Path, template: str, messages: Any, message: str
) -> None:
    spec = TextSpec(path=write(tmp_path / "a.jsonl", {"m": messages}), messages_column="m")
    with pytest.raises(RequestError, match=message):
        list(conversation_sequences(spec, chatty(template), 64))
