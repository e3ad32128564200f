"""Packing: against plain loops, no token lost or seen across documents, files equal to memory."""

import operator
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.data import (
    TokenBatch,
    TokenSequence,
    TopK,
    cut_into_blocks,
    memory_mapped,
    pack_sequences,
    shuffled,
    take_tokens,
)
from tests.support.packed_data import packed
from tests.support.tiny_models import tiny_model

DOCUMENTS = [list(range(10, 15)), [20], [], list(range(30, 43)), [50, 51], [60], list(range(70, 77))]


def plain_blocks(length: int) -> list[list[tuple[int, int, bool]]]:
    """(token, position, is a target) of every block, token by token."""
    blocks: list[list[tuple[int, int, bool]]] = [[]]
    for document in DOCUMENTS:
        position = 0
        for token in document:
            if len(blocks[-1]) == length:
                blocks.append([])
                position = 0
            blocks[-1].append((token, position, position > 0))
            position += 1
    return [block for block in blocks if len(block) == length]


@pytest.mark.parametrize("length", [2, 4, 7, 29])
def test_blocks_of_documents_are_those_of_a_plain_loop(length: int) -> None:
    data = packed(cut_into_blocks(DOCUMENTS, length, isolated=True))
    batch = data.batch(torch.arange(len(data)))
    got = torch.stack([batch.input_ids_BT, batch.position_ids_BT, batch.targets_BT], dim=-1)
    assert [[(i, p, bool(t)) for i, p, t in row] for row in got.tolist()] == plain_blocks(length)
    assert batch.mask_BT is None
    assert data.num_tokens(torch.arange(len(data))) == len(data) * length


def test_concatenated_blocks_say_nothing_of_documents() -> None:
    data = packed(cut_into_blocks(DOCUMENTS, 4, isolated=False))
    batch = data.batch(torch.tensor([2, 0]))
    flat = [token for document in DOCUMENTS for token in document]
    assert batch.input_ids_BT.tolist() == [flat[8:12], flat[:4]]
    assert (batch.targets_BT, batch.position_ids_BT, batch.mask_BT) == (None, None, None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_no_token_sees_another_document(family: str) -> None:
    """The model's output on packed documents is that on each by itself."""
    documents = [list(range(10, 15)), [20, 21], list(range(30, 35))]
    batch = packed(cut_into_blocks(documents, 12, isolated=True)).batch(torch.tensor([0]))
    model = tiny_model(family)
    with torch.no_grad():
        isolated = model(batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False).logits[0]
        alone = [model(torch.tensor([document]), use_cache=False).logits[0] for document in documents]
        together = model(batch.input_ids_BT, use_cache=False).logits[0]
    torch.testing.assert_close(isolated, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(isolated, together, atol=1e-2)


def answers(*lengths: int) -> list[TokenSequence]:
    """Sequences whose second half is to be learnt."""
    return [
        TokenSequence(np.arange(n) + 50 * i, targets=(np.arange(n) >= n // 2).astype(np.uint8))
        for i, n in enumerate(lengths, start=1)
    ]


def test_sequences_of_unequal_length_are_padded_to_the_longest_of_the_batch() -> None:
    data = packed(answers(4, 2, 6))
    batch = data.batch(torch.tensor([1, 0]))
    assert batch.input_ids_BT.tolist() == [[100, 101, 0, 0], [50, 51, 52, 53]]
    assert batch.mask_BT is not None
    assert batch.mask_BT.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.targets_BT.tolist() == [[0, 1, 0, 0], [0, 0, 1, 1]]
    assert batch.position_ids_BT is None
    assert data.lengths_S.tolist() == [4, 2, 6]
    assert (data.num_tokens(torch.tensor([0, 1])), data.num_tokens(torch.tensor([2]))) == (3, 3)
    assert data.largest_id == 155


def test_whole_sequences_share_one_where_they_fit() -> None:
    data = packed(pack_sequences(answers(3, 4, 2, 7, 1), 7))
    assert data.lengths_S.tolist() == [7, 2, 7, 1]
    batch = data.batch(torch.tensor([0, 1]))
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 0, 0, 0, 0]]
    assert batch.targets_BT.tolist() == [[0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0]]
    assert batch.mask_BT is not None
    assert batch.mask_BT.tolist()[1] == [1, 1, 0, 0, 0, 0, 0]


def test_padding_changes_nothing_for_the_tokens_before_it() -> None:
    data = packed(pack_sequences(answers(3, 4, 2), 7))
    model = tiny_model("llama")
    with torch.no_grad():
        wide = data.batch(torch.tensor([0, 1]))
        narrow = data.batch(torch.tensor([1]))
        in_batch = model(wide.input_ids_BT, position_ids=wide.position_ids_BT, use_cache=False).logits[1, :2]
        alone = model(narrow.input_ids_BT, use_cache=False).logits[0]
    torch.testing.assert_close(in_batch, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [0, 3, 4, 9, 12, 100])
def test_the_ceiling_of_tokens_is_kept(max_tokens: int) -> None:
    taken = [len(s.ids) for s in take_tokens(answers(4, 2, 6), max_tokens)]
    assert sum(taken) <= max_tokens
    assert taken == [4, 2, 6][: len(taken)]
    assert len(taken) == 3 or sum(taken) + [4, 2, 6][len(taken)] > max_tokens


def test_mapped_files_are_found_again_and_not_made_anew(tmp_path: Path) -> None:
    made = memory_mapped(lambda: cut_into_blocks(DOCUMENTS, 4, isolated=True), tmp_path / "tokens")
    again = memory_mapped(list, tmp_path / "tokens")
    chosen = torch.tensor([3, 1, 0])
    assert len(again) == len(made)
    for name, value in vars(made.batch(chosen)).items():
        other = getattr(again.batch(chosen), name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value is other
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[TokenSequence]:
        yield from answers(3)
        raise ValueError("the stream broke")

    with pytest.raises(ValueError, match="broke"):
        memory_mapped(broken, tmp_path / "tokens")
    assert list(tmp_path.iterdir()) == []


def test_a_shuffled_stream_holds_everything_once_and_little_at_a_time() -> None:
    items = iter(range(1000))
    given = [(i, operator.length_hint(items)) for i, _ in enumerate(shuffled(items, seed=1, buffer_size=50))]
    assert max(1000 - left - i for i, left in given) == 51
    orders = [list(shuffled(range(1000), seed, 50)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(1000)) != order for order in orders)


def test_a_batch_knows_the_index_of_each_of_its_rows() -> None:
    chosen_B = torch.tensor([2, 0])
    data = packed([TokenSequence(np.arange(n + 1)) for n in range(3)])
    batch = data.batch(chosen_B).to(torch.device("cpu"))
    assert batch.sequences_B is chosen_B
    assert batch.input_ids_BT.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.mask_BT.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_what_a_cache_gives_a_batch_moves_with_it() -> None:
    topk = TopK(torch.zeros(1, 4, 2, dtype=torch.long), torch.zeros(1, 4, 2))
    batch = TokenBatch(torch.zeros(1, 4, dtype=torch.long), sequences_B=torch.tensor([0]), teacher_topk=topk)
    moved = replace(batch, teacher_BTD=torch.zeros(1, 4, 3)).to(torch.device("meta"))
    assert moved.teacher_topk.ids_BTK.is_meta
    assert moved.teacher_BTD.is_meta
    assert not moved.sequences_B.is_meta
