"""Texts of tasks: how many are generated at a time, and that no more tokens are run than they have."""

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from actors.contracts import EvaluationSpec, ModelRef, ModelSpec
from actors.evaluation.evaluate import evaluate
from actors.evaluation.lm_eval import generation
from actors.evaluation.lm_eval.generation import LARGEST_BATCH, generation_batch, longest_text
from actors.evaluation.lm_eval.language_models import local_responder
from tests.support.tiny_models import tiny_llama

LONG = 131_072
NEW_TOKENS = 24
TASK = """
task: tiny_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: {new_tokens}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def long_llama() -> tuple[PreTrainedModel, Any]:
    model, tokenizer = tiny_llama(max_position_embeddings=LONG)
    tokenizer.model_max_length = LONG
    return model, tokenizer


def shapes_of(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return a list that fills with [rows, tokens in the cache and new ones] of each forward pass."""
    shapes: list[tuple[int, int]] = []

    def note(_model: PreTrainedModel, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        ids_BT = arguments[0] if arguments else settings["input_ids"]
        cache = settings.get("past_key_values")
        shapes.append((len(ids_BT), ids_BT.shape[1] + (cache.get_seq_length() if cache is not None else 0)))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search that GPUs get, on this machine's CPU."""
    monkeypatch.setattr(generation, "SEARCHED", ("cpu",))


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    rows = [{"question": "The lazy dog " * (1 + i), "answer": f"jumps {i}"} for i in range(7)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "write.yaml").write_text(TASK.format(data=data, new_tokens=NEW_TOKENS))
    return tmp_path


@pytest.mark.usefixtures("searched")
def test_nothing_longer_than_the_longest_request_is_run(task_folder: Path) -> None:
    """The model has room for 131,072 tokens; the longest request needs a hundred."""
    model, tokenizer = long_llama()
    longest = len(tokenizer("The lazy dog " * 7).input_ids) + NEW_TOKENS
    shapes = shapes_of(model)
    spec = EvaluationSpec(
        model=ModelRef(ModelSpec("unused")), tasks=("tiny_write",), include_path=str(task_folder)
    )
    reported: list[tuple[int, int, str]] = []
    metrics = evaluate(model, tokenizer, spec, lambda *step: reported.append(step)).metrics
    assert shapes[0] == (LARGEST_BATCH, longest)
    assert max(tokens for _, tokens in shapes) == longest < 200
    assert max(rows for rows, _ in shapes[1:]) == 7
    assert (7, 7) in {(done, total) for done, total, note in reported if note.startswith("generated texts")}

    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=7, max_length=512)
    expected = lm_eval.simple_evaluate(lm, tasks=["tiny_write"], task_manager=manager)["results"]
    assert [metric.value for metric in metrics] == [expected["tiny_write"]["exact_match,none"]]


@pytest.mark.usefixtures("searched")
def test_likelihoods_run_no_more_than_their_requests() -> None:
    model, tokenizer = long_llama()
    respond = local_responder(model, tokenizer)
    shapes = shapes_of(model.model)
    text = "Ancient foxes jump over lazy dogs. "
    respond("loglikelihood", [(text * 3, "and"), (text, "or")])
    respond("loglikelihood_rolling", [(text * 5,)])
    assert max(tokens for _, tokens in shapes) <= 1 + len(tokenizer(text * 5).input_ids)


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize(("tokens", "expected"), [(100 * 100, 64), (100 * 20, 16), (100, 1), (50, 1)])
def test_batches_are_halved_until_they_fit(tokens: int, expected: int) -> None:
    model, _ = long_llama()

    def limit(_model: PreTrainedModel, arguments: tuple[Any, ...]) -> None:
        if arguments[0].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(limit)
    assert generation_batch(model, 100) == expected


@pytest.mark.usefixtures("searched")
def test_only_longer_requests_are_searched_for_again() -> None:
    model, tokenizer = long_llama()
    respond = local_responder(model, tokenizer)
    shapes = shapes_of(model)
    settings = {"until": ["."], "max_gen_toks": 2}
    for text in ("a b c d", "a b", "a b c d", "a b c d e f g"):
        respond("generate_until", [(text, settings)])
    assert [rows for rows, _ in shapes].count(LARGEST_BATCH) == 2


def test_prompts_count_as_they_are_cut() -> None:
    settings = {"until": ["."], "max_gen_toks": 30}
    assert longest_text([(50, settings), (10, {"max_new_tokens": 60})], 256, 1000) == 80
    assert longest_text([(5000, settings)], 256, 1000) == 1000
    assert longest_text([(5, {})], 256, 1000) == 261
    assert longest_text([(5, {"max_length": 90})], 256, 1000) == 90
    assert longest_text([], 256, 1000) == 1
