"""Conversations: from records to token ids, of which only those of answers are to be learnt.

A conversation is rendered by a chat template. What is learnt of an answer is its
text and the mark that ends the turn: by the template's own `{% generation %}`
block if it has one, else the text by which the rendering grows with the answer.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from actors.contracts import TextSpec
from actors.data.bad_rows import RowTally
from actors.data.files import Record
from actors.data.packing import TokenSequence
from actors.data.text import PLAIN, chat_template_text, open_records
from actors.data.tokens import DOCUMENTS_PER_BATCH, tokenizer_errors
from actors.errors import RequestError

log = logging.getLogger(__name__)

Message = dict[str, str]

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models that were not trained on a chat format: `User: …` and `Assistant: …`, ended by the EOS token."""

GENERATION_BLOCK = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True)
class Conversation:
    """Messages, of which the first `num_prompt_messages` are not to be learnt.

    `finished` is False for a last answer that was cut off: its turn has no end.
    """

    messages: tuple[Message, ...]
    num_prompt_messages: int = 0
    finished: bool = True


@dataclass(frozen=True)
class WrittenText:
    """A conversation as text; `answers` are start and end of what is to be learnt of it."""

    text: str
    answers: tuple[tuple[int, int], ...]


Written = WrittenText | tuple[np.ndarray, np.ndarray]
"""A conversation as text, or as token ids and targets where the template marks the answers."""


def chat_template(tokenizer: PreTrainedTokenizerBase, spec: TextSpec) -> str:
    """Return the Jinja text of the chat template that `spec.chat_template` names.

    Raises:
        RequestError: the tokenizer has none, or the file cannot be read.
    """
    chosen = chat_template_text(spec)
    if chosen is not None:
        return PLAIN_TEMPLATE if chosen == PLAIN else chosen
    if not isinstance(tokenizer.chat_template, str):
        raise RequestError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so it cannot write "
            f"conversations; set data.chat_template to {PLAIN!r} or to a Jinja file, or take a chat model"
        )
    return tokenizer.chat_template


def read_prompts(spec: TextSpec, limit: int | None = None) -> list[tuple[Message, ...]]:
    """Return the prompts of a text that are not blank, in order: conversations without their last answers."""
    prompts: list[tuple[Message, ...]] = []
    for record in open_records(spec):
        messages = _conversation(record, spec).messages
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if messages and messages[-1]["content"].strip():
            prompts.append(messages)
        if len(prompts) == limit:
            break
    if not prompts:
        raise RequestError(f"{spec.name!r} holds no prompt that is not blank")
    return prompts


def conversation_sequences(
    spec: TextSpec,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    seed: int = 0,
    tally: RowTally | None = None,
) -> Iterator[TokenSequence]:
    """Yield a sequence of at most `sequence_length` tokens for each conversation, in order.

    What is longer is cut at its end. Conversations that the template cannot write, and those of
    which no token of an answer is left, because it is blank or cut off, are left out; `tally` and the
    log count them.

    Raises:
        RequestError: no chat template, or one that cannot write too many conversations; none is left.
    """
    template, tally = chat_template(tokenizer, spec), tally or RowTally(spec)
    kept, records = 0, open_records(spec, seed, tally)
    placed = ((tally.place, record) for record in records)
    while chunk := list(islice(placed, DOCUMENTS_PER_BATCH)):
        written: dict[str, Written] = {}
        for place, record in chunk:
            try:
                with tokenizer_errors(f"{place} of {spec.name!r}", tokenizer):
                    written[place] = _write(_conversation(record, spec), tokenizer, template)
            except RequestError as error:
                tally.skip(error)
        for ids, targets in _tokenized(written, tokenizer, spec.name):
            targets[:1] = 0  # nothing comes before the first token that could predict it
            if not targets[:sequence_length].any():
                tally.skip_unanswered()
                continue
            kept += 1
            yield TokenSequence(ids[:sequence_length], targets=targets[:sequence_length])
    tally.finish()
    skipped = tally.counts().unanswered
    if skipped:
        log.warning("%d of %d conversations skipped: no answer within the length", skipped, kept + skipped)
    if not kept:
        raise RequestError(
            f"none of the {skipped} conversations has an answer within {sequence_length} tokens; "
            "raise recovery.sequence_length or look at the column of the answers"
        )


def _write(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: str) -> Written:
    messages = list(conversation.messages)
    answers = [
        i
        for i in range(conversation.num_prompt_messages, len(messages))
        if messages[i]["role"] == "assistant" and messages[i]["content"].strip()
    ]
    if answers and not (
        GENERATION_BLOCK.search(template) and conversation.num_prompt_messages <= 1 and conversation.finished
    ):
        return _write_by_prefix(conversation, answers, tokenizer, template)
    if not answers:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = render(messages, tokenizer, template, **options)
    return np.array(encoded["input_ids"]), np.array(encoded["assistant_masks"], dtype=np.uint8)


def _tokenized(
    written: dict[str, Written], tokenizer: PreTrainedTokenizerBase, source: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield token ids and targets of each conversation; the texts in one call, which uses several cores."""
    texts = {place: each for place, each in written.items() if isinstance(each, WrittenText)}
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    encoded: dict[str, Any] = {"input_ids": [], "offset_mapping": []}
    if texts:
        with tokenizer_errors(f"one of {', '.join(texts)} of {source!r}", tokenizer):
            encoded = tokenizer([each.text for each in texts.values()], **options)
    results = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    for each in written.values():
        if not isinstance(each, WrittenText):
            yield each
            continue
        ids, offsets = next(results)
        starts, ends = np.array(offsets).T
        targets = np.zeros(len(starts), dtype=np.uint8)
        for start, end in each.answers:
            targets[(starts >= start) & (ends <= end) & (ends > starts)] = 1
        yield np.array(ids), targets


def render(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    add_generation_prompt: bool = False,
    **options: Any,
) -> Any:
    """Return the messages as the template writes them: text, or as the `options` of transformers request.

    Raises:
        RequestError: the template refuses them, as some do with system messages.
    """
    options = {"tokenize": False, **options}
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=add_generation_prompt, **options
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise RequestError(
            f"the chat template of {tokenizer.name_or_path!r} cannot write the messages ({roles}): {error}"
        ) from error


def _write_by_prefix(
    conversation: Conversation, answers: list[int], tokenizer: PreTrainedTokenizerBase, template: str
) -> WrittenText:
    messages = list(conversation.messages)
    text = render(messages, tokenizer, template)
    spans = [_answer_span(messages, i, text, tokenizer, template) for i in answers]
    if not conversation.finished:
        start, _ = spans[-1]
        content = messages[-1]["content"].strip()
        end = text.index(content, start) + len(content)
        text, spans[-1] = text[:end], (start, end)
    return WrittenText(text, tuple(spans))


def _answer_span(
    messages: list[Message], answer: int, text: str, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[int, int]:
    """Return start and end in `text` of the message number `answer`, with its end of turn."""
    before = render(messages[:answer], tokenizer, template, add_generation_prompt=True)
    after = render(messages[: answer + 1], tokenizer, template)
    if not (text.startswith(after) and after.startswith(before)):
        raise RequestError(
            f"the chat template of {tokenizer.name_or_path!r} changes earlier turns when one is added, so "
            "answers cannot be told from prompts; give data.chat_template one with a {% generation %} block"
        )
    return len(before), len(after.rstrip())


def _conversation(record: Record, spec: TextSpec) -> Conversation:
    if spec.generated is not None:
        prompt = tuple(record["prompt"])
        answer = {"role": "assistant", "content": record["response"]}
        return Conversation((*prompt, answer), num_prompt_messages=len(prompt), finished=record["finished"])
    if spec.messages_column is not None:
        return Conversation(tuple(_message(message) for message in record[spec.messages_column]))
    prompt_text, more = record[str(spec.prompt_column)], record.get(spec.input_column or "")
    question = _message({"role": "user", "content": f"{prompt_text}\n\n{more}" if more else prompt_text})
    if spec.response_column is None:
        return Conversation((question,), num_prompt_messages=1)
    answer = {"role": "assistant", "content": record[spec.response_column]}
    return Conversation((question, answer), num_prompt_messages=1)


def _message(message: Message) -> Message:
    return {"role": message["role"], "content": message["content"]}
