"""Stored states are those of the plain model, for every way that sequences are packed and cut into shards."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from actors.contracts import ModelSpec, TeachSpec, TextSpec
from actors.data import TeacherStates, TokenBatch, TrainingData, with_teacher_states
from actors.data.teacher_states import INDEX
from actors.errors import RequestError, WorkError
from actors.models import load_model
from actors.recovery import training_data
from actors.teaching import shards, shards_of, teach_locally
from tests.support.tiny_models import save_tiny, tiny_tokenizer

_TEXT = "The quick brown fox jumps over the lazy dog . Stability of the higher layer is greater . "
LENGTH = 16


@pytest.fixture
def spec(tmp_path: Path) -> TeachSpec:
    path = save_tiny(tmp_path / "model", num_layers=4)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f" = Part {i} = \n{i} {_TEXT}" for i in range(20)))
    return TeachSpec(
        model=ModelSpec(path),
        data=TextSpec(path=str(text)),
        sequence_length=LENGTH,
        states="float32",
        entering=(2,),
        batch_size=3,
    )


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 5 * LENGTH)


class Plain(NamedTuple):
    """What one sequence comes to in transformers' own forward pass: final state, a block's input, logits."""

    last_TD: Tensor
    entering_TD: Tensor
    logits_TV: Tensor


@torch.no_grad()
def plain(spec: TeachSpec, batch: TokenBatch, row: int) -> Plain:
    """Run one row of a batch alone, without its padding."""
    model, _ = load_model(spec.model.path)
    length = batch.input_ids_BT.shape[1] if batch.mask_BT is None else int(batch.mask_BT[row].sum())
    positions = None if batch.position_ids_BT is None else batch.position_ids_BT[row : row + 1, :length]
    out = model(
        batch.input_ids_BT[row : row + 1, :length],
        position_ids=positions,
        use_cache=False,
        output_hidden_states=True,
    )
    return Plain(out.hidden_states[-1][0], out.hidden_states[spec.entering[0]][0], out.logits[0])


def taught(spec: TeachSpec, tmp_path: Path, block: int | None = None) -> TrainingData:
    """The training data of `spec` with the states that a stage stores of them."""
    result = teach_locally(spec, str(tmp_path / "taught"))
    data = training_data(spec.reading(), tiny_tokenizer())
    assert (result.num_sequences, result.num_tokens) == (len(data), int(data.lengths_S.sum()))
    assert result.num_bytes == sum(file.stat().st_size for file in (tmp_path / "taught").iterdir())
    return with_teacher_states(data, result.artifact, block)


@pytest.mark.parametrize("packing", ["concatenated", "documents"])
def test_states_are_those_of_the_plain_model(spec: TeachSpec, tmp_path: Path, packing: str) -> None:
    spec = replace(spec, packing=packing)  # type: ignore[arg-type]
    data = taught(spec, tmp_path, block=2)
    chosen_B = torch.tensor([7, 0, len(data) - 1])
    batch = data.batch(chosen_B)  # type: ignore[arg-type]
    assert batch.teacher_BTD is not None
    assert batch.entering_BTD is not None
    assert batch.teacher_topk is None
    for row in range(3):
        expected = plain(spec, batch, row)
        length = len(expected.last_TD)
        torch.testing.assert_close(batch.teacher_BTD[row, :length], expected.last_TD, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            batch.entering_BTD[row, :length], expected.entering_TD, rtol=1e-5, atol=1e-6
        )
        assert not batch.teacher_BTD[row, length:].any()


def test_top_k_are_the_likeliest_tokens_of_the_plain_model(spec: TeachSpec, tmp_path: Path) -> None:
    batch = taught(replace(spec, top_k=5), tmp_path).batch(torch.tensor([3, 9]))  # type: ignore[arg-type]
    assert batch.teacher_BTD is None
    assert batch.teacher_topk is not None
    for row in range(2):
        values_TK, ids_TK = plain(spec, batch, row).logits_TV.log_softmax(-1).topk(5)
        assert torch.equal(batch.teacher_topk.ids_BTK[row], ids_TK)
        # Stored in float16.
        torch.testing.assert_close(
            batch.teacher_topk.log_probabilities_BTK[row], values_TK, rtol=2**-10, atol=1e-4
        )


def test_bfloat16_rounds_a_state_by_at_most_one_part_in_256(spec: TeachSpec, tmp_path: Path) -> None:
    exact = taught(spec, tmp_path / "exact").batch(torch.tensor([4]))  # type: ignore[arg-type]
    rounded = taught(replace(spec, states="bfloat16"), tmp_path / "rounded").batch(
        torch.tensor([4])  # type: ignore[arg-type]
    )
    assert exact.teacher_BTD is not None
    assert rounded.teacher_BTD is not None
    assert rounded.teacher_BTD.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.teacher_BTD.float(), exact.teacher_BTD, rtol=2**-8, atol=0)


def test_shards_cover_all_sequences_and_follow_from_the_data_alone(spec: TeachSpec, tmp_path: Path) -> None:
    lengths_S = torch.tensor([30, 60, 10, 90, 5, 5])
    assert [(s.number, s.first, s.count) for s in shards_of(lengths_S)] == [(0, 0, 2), (1, 2, 2), (2, 4, 2)]
    heard: list[tuple[int, int]] = []
    one = teach_locally(spec, str(tmp_path / "one"), lambda done, total, _: heard.append((done, total)))
    assert [done for done, _ in heard] == [80 * (i + 1) for i in range(len(heard) - 1)] + [one.num_tokens]
    assert len(one.artifact.files) == len(heard) + 1
    two = teach_locally(replace(spec, batch_size=1), str(tmp_path / "two"))
    assert json.loads((tmp_path / "one" / INDEX).read_text()) == json.loads(
        (tmp_path / "two" / INDEX).read_text()
    )
    for file in one.artifact.files[1:]:
        theirs = load_file(tmp_path / "two" / file.name)
        for name, value in load_file(tmp_path / "one" / file.name).items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
    assert two.num_tokens == one.num_tokens


def test_states_of_other_data_are_refused(spec: TeachSpec, tmp_path: Path) -> None:
    result = teach_locally(spec, str(tmp_path / "taught"))
    text = Path(str(spec.data.path))
    text.write_text(text.read_text().replace("0", "9"))
    other = training_data(spec.reading(), tiny_tokenizer())
    changed = with_teacher_states(other, result.artifact)
    with pytest.raises(WorkError, match=r"of other data: the tokens of sequences \[0\] differ; set recovery"):
        changed.batch(torch.tensor([0]))  # type: ignore[arg-type]
    with pytest.raises(WorkError, match="of other data: they hold"):
        TeacherStates(tmp_path / "taught", other.lengths_S[1:])


def test_what_does_not_fit_is_refused_before_anything_is_computed(
    spec: TeachSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "runs" / "taught")
    with pytest.raises(RequestError, match=r"take .* GB, and recovery\.teacher_cache_gb allows 1e-06; raise"):
        teach_locally(replace(spec, max_gb=1e-6), uri)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: usage._replace(free=1000))
    with pytest.raises(RequestError, match=r"has 1e-06 GB free; free some space, choose another storage"):
        teach_locally(spec, uri)
    assert not Path(uri).exists()


def test_what_a_token_takes(spec: TeachSpec, tmp_path: Path) -> None:
    result = teach_locally(spec, str(tmp_path / "taught"))
    tensors = [
        value
        for file in result.artifact.files[1:]
        for value in load_file(tmp_path / "taught" / file.name).values()
    ]
    held = sum(value.numel() * value.element_size() for value in tensors)
    assert held == result.num_tokens * spec.bytes_per_token(hidden_size=tensors[0].shape[-1])
    assert replace(spec, states="bfloat16", entering=()).bytes_per_token(576) == 4 + 2 * 576
    assert replace(spec, top_k=64, entering=()).bytes_per_token(576) == 4 + 64 * 6


def test_a_block_that_the_model_lacks_is_refused(spec: TeachSpec, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"teacher_cache_blocks has 4, but the blocks of .* are 0 to 3"):
        teach_locally(replace(spec, entering=(1, 4)), str(tmp_path / "taught"))
