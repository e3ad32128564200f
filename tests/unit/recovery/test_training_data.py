"""What recovery is fed: each token once an epoch, the same after a resume, never more than asked for."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from actors.contracts import AdapterSpec, ModelRef, ModelSpec, RecoverySpec, RowCounts, TextSpec
from actors.data import PackedData, TokenSequence, TrainingData, describe_text, load_texts
from actors.errors import ChangedError, RequestError
from actors.recovery.objectives import OBJECTIVES
from actors.recovery.training import training_data as data_module
from actors.recovery.training.local import recover_locally
from actors.recovery.training.training_data import check_data, check_vocabulary, training_data, training_order
from tests.support.tiny_models import save_tiny, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
KINDS = ["concatenated", "documents", "streamed", "streamed documents", "answers", "answers in blocks"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ITERABRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def request(directory: Path, kind: str, **changes: object) -> RecoverySpec:
    """60 documents, or conversations, of unequal length."""
    path = directory / "data.jsonl"
    rows = [{"text": f"number {i}" + " the lazy dog" * (i % 7), "a": f"fox {i}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TextSpec(path=str(path), streaming="streamed" in kind)
    if "answers" in kind:
        text = replace(text, prompt_column="text", response_column="a")
    apart = "documents" if kind.endswith(("documents", "blocks")) else "concatenated"
    spec = RecoverySpec(
        model=ModelRef(ModelSpec("m")), data=text, packing=apart, sequence_length=64, batch_size=4
    )
    return replace(spec, **{"max_tokens": 2000, **changes})


def read(data: TrainingData, chosen: torch.Tensor) -> list[tuple[int, ...]]:
    """The tokens of the chosen sequences, without padding."""
    batch = data.batch(chosen)
    mask = torch.ones_like(batch.input_ids_BT) if batch.mask_BT is None else batch.mask_BT
    rows = zip(batch.input_ids_BT, mask, strict=True)
    return [tuple(ids[kept.bool()].tolist()) for ids, kept in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_workers_together_take_every_sequence_once_an_epoch(tmp_path: Path, kind: str) -> None:
    spec = request(tmp_path, kind, max_tokens=9000)
    order_SB = training_order(spec, training_data(spec, TOKENIZER), seed=1)
    workers = [training_data(spec, TOKENIZER) for _ in range(2)]
    seen = Counter(
        int(s) for step in order_SB for rank in (0, 1) for s in step[rank * 2 : rank * 2 + 2] if workers[rank]
    )
    assert set(seen) == set(range(len(workers[0])))
    assert max(seen.values()) - min(seen.values()) <= 1
    everything = torch.arange(len(workers[0]))
    assert read(workers[0], everything) == read(workers[1], everything)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_tokens", [300, 1111, 5000])
def test_no_more_tokens_are_read_than_asked_for_and_another_step_would_be(
    tmp_path: Path, kind: str, max_tokens: int
) -> None:
    spec = request(tmp_path, kind, max_tokens=max_tokens)
    data = training_data(spec, TOKENIZER)
    order_SB = training_order(spec, data, seed=5)
    used = sum(len(row) for step in order_SB for row in read(data, step))
    longer = training_order(replace(spec, max_tokens=max_tokens + 4 * 64), data, seed=5)
    next_step = sum(len(row) for row in read(data, longer[len(order_SB)]))
    assert used <= max_tokens < used + next_step
    assert torch.equal(longer[: len(order_SB)], order_SB)


@pytest.mark.parametrize("streamed", ["streamed", "streamed documents"])
def test_a_stream_holds_the_documents_whole_and_shuffled(tmp_path: Path, streamed: str) -> None:
    spec = request(tmp_path, streamed, max_tokens=10**6, batch_size=1)
    data = training_data(spec, TOKENIZER)
    text = TOKENIZER.decode([i for row in read(data, torch.arange(len(data))) for i in row])
    lines, rows = text.split("\n"), load_texts(spec.data)
    assert lines[:-1] != rows[: len(lines) - 1]
    assert set(lines[:-1]) < set(rows)
    assert len(set(lines)) == len(lines) >= len(rows) - 10
    other = training_data(replace(spec, seed=1), TOKENIZER)
    assert read(other, torch.arange(2)) != read(data, torch.arange(2))


def test_a_stream_is_read_once_a_node_and_only_as_far_as_needed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = request(tmp_path, "streamed", max_tokens=300)
    (tmp_path / "data.jsonl").open("a").write("{not json}\n")
    monkeypatch.setattr(data_module, "SHUFFLE_BUFFER", 5)
    monkeypatch.setattr("actors.data.tokens.DOCUMENTS_PER_BATCH", 4)
    first = training_data(spec, TOKENIZER)
    assert int(first.lengths_S.sum()) == 300 // 64 * 64
    monkeypatch.setattr(data_module, "_sequences", lambda *_: pytest.fail("the stream is read again"))
    again = training_data(spec, TOKENIZER)
    assert read(again, torch.arange(4)) == read(first, torch.arange(4))
    assert isinstance(again, PackedData)
    assert len(list((cache / "tokens").iterdir())) == 1


@pytest.mark.parametrize("kind", ["answers", "answers in blocks"])
def test_the_mean_of_answers_is_over_their_tokens(tmp_path: Path, kind: str) -> None:
    data = training_data(request(tmp_path, kind, sequence_length=128), TOKENIZER)
    chosen = torch.arange(len(data))
    batch = data.batch(chosen)
    assert data.num_tokens(chosen) == int(batch.targets_BT.sum())
    learnt = TOKENIZER.decode(batch.input_ids_BT[batch.targets_BT.bool()])
    assert learnt == "".join(f"fox {i}</s>" for i in range(60))


@pytest.mark.parametrize("kind", ["documents", "streamed"])
def test_training_goes_on_with_the_same_tokens_after_a_stop(tmp_path: Path, kind: str) -> None:
    """The real loop: stopped after step 3 and started again, it ends with the same losses and counts."""
    path = save_tiny(tmp_path / "model", num_layers=4)
    spec = replace(
        request(tmp_path, kind, max_tokens=6 * 256),
        model=ModelRef(ModelSpec(path), dropped=(2,)),
        adapter=AdapterSpec(rank=2),
        checkpoint_steps=2,
    )
    whole = recover_locally(spec, str(tmp_path / "a"), tmp_path / "work-a")

    class Stopped(Exception):
        pass

    def stop(done: int, _total: int, _note: str = "") -> None:
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        recover_locally(spec, str(tmp_path / "b"), tmp_path / "work-b", stop)
    resumed = recover_locally(spec, str(tmp_path / "b"), tmp_path / "work-b")
    assert [(s.step, s.tokens, s.loss) for s in resumed.steps] == [
        (s.step, s.tokens, s.loss) for s in whole.steps
    ]
    assert resumed.tokens == sum(s.tokens for s in resumed.steps) == 6 * 256


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("concatenated", {"sequence_length": 10_000}, r"gives \d+ tokens, fewer than one sequence of 10000"),
        ("documents", {"sequence_length": 10_000}, "gives 0 sequences of 10000 tokens"),
        ("streamed", {"sequence_length": 10_000}, "gives 0 sequences of 10000 tokens"),
        ("streamed", {"max_tokens": 100}, "gives 1 sequences of 64 tokens, fewer than one batch of 4"),
        ("answers", {"max_tokens": 20}, r"max_tokens 20 is less than one step of \d+ tokens"),
        (
            "answers",
            {"batch_size": 61, "sequence_length": 128},
            "gives 60 sequences.*fewer than one batch of 61",
        ),
        ("answers", {"sequence_length": 2}, "none of the 60 conversations has an answer within 2 tokens"),
    ],
)
def test_too_little_data_is_reported(
    tmp_path: Path, kind: str, changes: dict[str, int], message: str
) -> None:
    spec = request(tmp_path, kind, **changes)
    with pytest.raises(RequestError, match=message):
        training_order(spec, training_data(spec, TOKENIZER), seed=0)


def test_a_vocabulary_larger_than_the_embedding_is_reported(tmp_path: Path) -> None:
    data = training_data(request(tmp_path, "concatenated"), TOKENIZER)
    check_vocabulary(data, tiny_llama()[0])
    small, _ = tiny_llama(vocab_size=100)
    with pytest.raises(RequestError, match=rf"gives the token id {data.largest_id}.*has 100 rows"):
        check_vocabulary(data, small)


QA = {"prompt_column": "q", "response_column": "a"}


@pytest.mark.parametrize(
    ("trains_on", "columns", "message"),
    [
        ("text", {}, None),
        ("text", QA, r"running text \(text_column\)"),
        ("answers", QA, None),
        ("answers", {"messages_column": "m"}, None),
        ("answers", {}, "needs prompt_column and response_column, or messages_column"),
        ("answers", {"prompt_column": "q"}, "needs prompt_column and response_column"),
        ("responses", {"prompt_column": "q"}, None),
        ("responses", {}, "needs the prompts"),
    ],
)
def test_data_must_have_what_the_objective_trains_on(
    trains_on: str, columns: dict[str, str], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(OBJECTIVES["kd"], trains_on=trains_on)
    monkeypatch.setitem(OBJECTIVES, "some", row)
    if message is None:
        check_data("some", TextSpec(path="x.jsonl", **columns))
    else:
        with pytest.raises(RequestError, match=f"objective 'some'.*{message}"):
            check_data("some", TextSpec(path="x.jsonl", **columns))


@pytest.mark.parametrize("kind", KINDS)
def test_data_exchanged_since_they_were_described_are_refused(tmp_path: Path, kind: str) -> None:
    spec = request(tmp_path, kind)
    spec = replace(spec, data=describe_text(spec.data).spec)
    training_data(spec, TOKENIZER)
    file = tmp_path / "data.jsonl"
    file.write_text(file.read_text().replace("lazy dog", "calm cat"))
    with pytest.raises(ChangedError, match=r"data\.jsonl"):
        training_data(spec, TOKENIZER)


def test_a_stream_that_changes_before_it_is_kept_is_not_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, file, sequences = (
        request(tmp_path, "streamed"),
        tmp_path / "data.jsonl",
        data_module._sequences,
    )

    def changed_meanwhile(*arguments: Any) -> Iterator[Any]:
        yield from sequences(*arguments)
        file.write_text(file.read_text().replace("lazy dog", "calm cat"))

    monkeypatch.setattr(data_module, "_sequences", changed_meanwhile)
    with pytest.raises(ChangedError, match=r"data\.jsonl"):
        training_data(replace(spec, max_tokens=10**6), TOKENIZER)
    assert list((cache / "tokens").iterdir()) == []


def test_text_is_tokenised_once_a_node(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by threads that ask at the same time: one makes the sequences, the others wait for them."""
    spec = request(tmp_path, "answers", sequence_length=128)
    made: list[int] = []
    sequences = data_module._sequences

    def slowly(*arguments: Any) -> Iterator[TokenSequence]:
        made.append(1)
        time.sleep(0.2)
        yield from sequences(*arguments)

    monkeypatch.setattr(data_module, "_sequences", slowly)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: training_data(spec, TOKENIZER), range(4)))
    assert len(made) == 1
    assert len({tuple(read(data, torch.arange(60))) for data in found}) == 1
    assert [path.name[0] for path in (cache / "tokens").iterdir()] != ["."]
    for other in (replace(spec, sequence_length=96), replace(spec, packing="documents")):
        training_data(other, TOKENIZER)
    assert len(made) == 3
    training_data(replace(spec, seed=1, max_tokens=7), TOKENIZER)
    assert len(made) == 3


def test_rows_left_out_are_known_to_every_worker(tmp_path: Path) -> None:
    spec = request(tmp_path, "answers", sequence_length=128)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps({"text": "x", "a": None}) + "\n" + json.dumps({"text": "x", "a": " "}) + "\n")
    spec = replace(spec, data=replace(spec.data, max_bad_rows=0.1))
    for _ in range(2):
        assert training_data(spec, TOKENIZER).rows == RowCounts(read=62, bad=1, unanswered=1)


def with_bos() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )
    return tokenizer


@pytest.mark.parametrize("kind", ["concatenated", "documents", "streamed", "streamed documents"])
def test_special_tokens_stand_at_the_beginning_of_each_document(tmp_path: Path, kind: str) -> None:
    tokenizer, spec = with_bos(), request(tmp_path, kind, sequence_length=16)
    plain = training_data(spec, tokenizer)
    marked = training_data(replace(spec, special_tokens=True), tokenizer)
    bos, numbers = tokenizer.convert_tokens_to_ids("<s>"), "0123456789"
    assert not any(bos in row for row in read(plain, torch.arange(len(plain))))
    text = tokenizer.decode([i for row in read(marked, torch.arange(len(marked))) for i in row])
    first, *documents = text.split("<s>")
    assert first == ""
    assert len(documents) > 50
    assert all(document.startswith("number ") and document[7] in numbers for document in documents[:-1])


@pytest.mark.parametrize("kind", ["concatenated", "answers"])
def test_epochs_end_the_training_before_max_tokens_does(tmp_path: Path, kind: str) -> None:
    spec = request(tmp_path, kind, max_tokens=10**6, epochs=3)
    data = training_data(spec, TOKENIZER)
    order_SB = training_order(spec, data, seed=1)
    assert len(order_SB) == 3 * len(data) // 4
    assert torch.equal(order_SB, training_order(replace(spec, epochs=None), data, seed=1)[: len(order_SB)])
    short = replace(spec, max_tokens=600)
    assert torch.equal(
        training_order(short, data, seed=1), training_order(replace(short, epochs=None), data, seed=1)
    )


def test_batches_of_like_length_take_every_sequence_once_and_pad_less(tmp_path: Path) -> None:
    spec = request(tmp_path, "answers", max_tokens=10**5, epochs=2)
    data = training_data(spec, TOKENIZER)

    def padding(order_SB: torch.Tensor) -> int:
        lengths_SB = data.lengths_S[order_SB]
        return int((lengths_SB.amax(dim=1, keepdim=True) - lengths_SB).sum())

    drawn = training_order(spec, data, seed=3)
    grouped = training_order(replace(spec, group_by_length=True), data, seed=3)
    assert sorted(grouped.flatten().tolist()) == sorted(drawn.flatten().tolist())
    assert padding(grouped) < 0.3 * padding(drawn)
    widths = data.lengths_S[grouped].amax(dim=1).tolist()
    assert widths != sorted(widths, reverse=True)
    longer = training_order(replace(spec, group_by_length=True, epochs=3), data, seed=3)
    assert torch.equal(longer[: len(grouped)], grouped)
