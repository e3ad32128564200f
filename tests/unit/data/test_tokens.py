"""Token ids: exact accounting, no special tokens in blocks, an order that ignores the workers."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from actors.contracts import TextSpec
from actors.data import (
    batch_order,
    calibration_sequences,
    load_texts,
    pack_blocks,
    tokenize_documents,
    tokenize_text,
)
from actors.errors import RequestError
from tests.support.tiny_models import MAX_POSITIONS, tiny_tokenizer

LINES = [" = Title = \n", "\n", "The quick brown fox .\n", "Ancient deities are lazy .\n"] * 20


def tokenizer_with_bos() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return tokenizer


def test_tokens_are_those_of_the_whole_text() -> None:
    tokenizer = tokenizer_with_bos()
    ids = tokenize_text(LINES, tokenizer)
    assert ids.dtype == torch.long
    assert tokenizer.decode(ids) == "".join(LINES)
    assert tokenizer.bos_token_id not in ids
    assert torch.equal(tokenize_text(LINES, tokenizer, max_tokens=7), ids[:7])


def test_documents_do_not_run_into_each_other() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenize_text(["a b", "", "c\n", "d"], tokenizer)) == "a b\nc\nd"


def test_long_text_warns_nobody(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    assert len(tokenize_text(LINES, tiny_tokenizer())) > MAX_POSITIONS
    assert caplog.records == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("max_tokens", "blocks"), [(None, None), (100, 6), (96, 6), (95, 5), (16, 1)])
def test_blocks_are_full_and_counted(max_tokens: int | None, blocks: int | None) -> None:
    ids = tokenize_text(LINES, tiny_tokenizer())
    packed = pack_blocks(LINES, tiny_tokenizer(), sequence_length=16, max_tokens=max_tokens)
    assert packed.shape == (blocks or len(ids) // 16, 16)
    assert torch.equal(packed.flatten(), ids[: packed.numel()])


def test_too_short_a_text_says_how_many_tokens_there_are() -> None:
    count = len(tokenize_text(["short"], tiny_tokenizer()))
    with pytest.raises(RequestError, match=f"gives {count} tokens, fewer than one sequence of 64"):
        pack_blocks(["short"], tiny_tokenizer(), sequence_length=64)
    with pytest.raises(RequestError, match=r"max_tokens is 8"):
        pack_blocks(LINES, tiny_tokenizer(), sequence_length=64, max_tokens=8)


def test_calibration_sequences_are_the_rows_with_special_tokens() -> None:
    tokenizer = tokenizer_with_bos()
    sequences = calibration_sequences([*LINES[:4], "   \n"], tokenizer, sequence_length=512)
    assert [tokenizer.decode(s) for s in sequences] == ["<s>" + LINES[i].rstrip("\n") for i in (0, 2, 3)]
    assert all(s.dtype == torch.long and s.dim() == 1 for s in sequences)
    short = calibration_sequences(LINES, tokenizer, sequence_length=5, max_sequences=2)
    assert [s.tolist() for s in short] == [s.tolist()[:5] for s in sequences[:2]]
    with pytest.raises(RequestError, match="not blank"):
        calibration_sequences(["\n", ""], tokenizer, sequence_length=8)


def test_appendix_a_gives_ten_sequences() -> None:
    texts = load_texts(TextSpec(builtin="iterabre-appendix-a"))
    sequences = calibration_sequences(texts, tiny_tokenizer(), sequence_length=512)
    assert len(sequences) == 10
    assert tiny_tokenizer().decode(sequences[0]) == " = There ’s Got to Be a Way = "


def test_every_epoch_takes_every_sequence_once() -> None:
    order = batch_order(num_sequences=10, batch_size=4, num_steps=10, seed=3)
    assert order.shape == (10, 4)
    epochs = order.flatten().view(4, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


def test_order_depends_on_the_seed_alone_and_continues() -> None:
    order = batch_order(7, 3, 20, seed=1)
    assert torch.equal(order, batch_order(7, 3, 20, seed=1))
    assert torch.equal(order[:5], batch_order(7, 3, 5, seed=1))
    assert not torch.equal(order, batch_order(7, 3, 20, seed=2))
    assert batch_order(7, 3, 0, seed=1).shape == (0, 3)
    with pytest.raises(RequestError, match="no training sequences"):
        batch_order(0, 3, 1, seed=1)


HALF = "x \ud800"
"""Half of a character, which no tokenizer encodes."""


def test_a_row_that_the_tokenizer_cannot_read_is_reported() -> None:
    tokenizer, rows = tiny_tokenizer(), ["a\n", "\n", "b\n", HALF, "c"]
    tokenizer.name_or_path = "some-tokenizer"
    row = r"row 3 of 'a\.txt': the tokenizer of 'some-tokenizer' cannot read it.*leave it out"
    with pytest.raises(RequestError, match=row):
        calibration_sequences(rows, tokenizer, 8, source="'a.txt'")
    assert len(calibration_sequences(rows, tokenizer, 8, max_sequences=2)) == 2
    with pytest.raises(RequestError, match=row):
        pack_blocks(rows, tokenizer, 2, source="'a.txt'")
    with pytest.raises(RequestError, match=r"the document of 'a\.txt' that begins with 'x "):
        list(tokenize_documents(rows, tokenizer, "'a.txt'"))


def test_what_a_tokenizer_of_its_own_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object, *_: object, **__: object) -> None:
        raise KeyError("missing")

    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "__call__", fails)
    with pytest.raises(RequestError, match=r"row 0 of the calibration text: .*KeyError: 'missing'"):
        calibration_sequences(["a"], tokenizer, 8)
