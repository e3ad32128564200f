"""Memory that does not suffice: once more with half as much at a time, then an error by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayTaskError

from actors.contracts import (
    EvaluationSpec,
    GenerationSpec,
    ModelRef,
    ModelSpec,
    PerplexitySpec,
    ScoreSpec,
    TextSpec,
)
from actors.errors import MemoryExhaustedError, WorkError
from actors.evaluation import evaluate, evaluate_model
from actors.evaluation.batch_size import batch_sizes
from actors.generation import responses
from actors.out_of_memory import is_out_of_memory, once_more_with_less
from actors.scoring import score_locally
from actors.scoring.measures import wavefront
from tests.support.tiny_models import save_tiny

WORDS = {"what": "evaluation of 'm'", "setting": "evaluation.batch_size", "remedy": "use a larger device"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("memory")
    save_tiny(directory / "model", num_layers=3)
    (directory / "text.txt").write_text("\n".join(f"{i} the quick brown fox jumps" for i in range(40)))
    return directory


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (OutOfMemoryError("Task was killed due to the node running low on memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RayTaskError("f", "tb", torch.OutOfMemoryError("x"), "f", 1, "h").as_instanceof_cause(), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
        (WorkError("can't allocate memory"), False),
        (MemoryExhaustedError("named already"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: Exception, lacks: bool) -> None:
    assert is_out_of_memory(error) is lacks


def fitting(most: int, tried: list[int]) -> Callable[[int], int]:
    def work(size: int) -> int:
        tried.append(size)
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size

    return work


def test_half_is_tried_once_and_then_the_setting_is_named() -> None:
    tried: list[int] = []
    assert once_more_with_less(fitting(4, tried), 8, 4, **WORDS) == 4
    assert tried == [8, 4]
    tried.clear()
    with pytest.raises(MemoryExhaustedError) as raised:
        once_more_with_less(fitting(2, tried), 8, 4, **WORDS)
    assert tried == [8, 4]
    assert str(raised.value) == (
        "evaluation of 'm': memory does not suffice even with half of evaluation.batch_size "
        "(OutOfMemoryError: CUDA out of memory); set evaluation.batch_size lower, or use a larger device"
    )
    with pytest.raises(MemoryExhaustedError, match=r"with evaluation\.batch_size at its lowest"):
        once_more_with_less(fitting(0, tried), 1, None, **WORDS)


def test_other_errors_are_not_tried_again() -> None:
    tried: list[int] = []

    def work(size: int) -> int:
        tried.append(size)
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        once_more_with_less(work, 8, 4, **WORDS)
    assert tried == [8]


def test_an_evaluation_that_does_not_fit_has_the_same_numbers_with_half_the_batch(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PerplexitySpec(name="fox", data=TextSpec(path=str(place / "text.txt")), context=16, max_tokens=256)
    spec = EvaluationSpec(model=ModelRef(ModelSpec(str(place / "model"))), perplexity=(text,))
    whole = evaluate_model(spec)
    sizes: list[int] = []
    measured = evaluate.token_perplexity

    def limited(model: object, ids: object, context: int, batch_size: int, *progress: object) -> object:
        sizes.append(batch_size)
        if batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(model, ids, context, batch_size, *progress)

    monkeypatch.setattr(evaluate, "token_perplexity", limited)
    halved = evaluate_model(spec)
    assert sizes == [8, 4]
    for got, want in zip(halved.metrics, whole.metrics, strict=True):
        assert got.value == pytest.approx(want.value, rel=1e-6)
    with pytest.raises(MemoryExhaustedError, match=r"half of evaluation\.batch_size"):
        evaluate_model(replace(spec, batch_size=32))


def test_a_scoring_that_does_not_fit_is_done_with_half_of_its_budget(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ScoreSpec(
        model=ModelRef(ModelSpec(str(place / "model"))), calibration=TextSpec(path=str(place / "text.txt"))
    )
    whole = score_locally(spec)
    budgets: list[int] = []
    planned = wavefront.plan_waves

    def limited(lengths: object, candidates: object, costs: object, budget: int) -> object:
        budgets.append(budget)
        if len(budgets) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return planned(lengths, candidates, costs, budget)

    monkeypatch.setattr(wavefront, "plan_waves", limited)
    halved = score_locally(spec)
    assert set(budgets[1:]) == {budgets[0] // 2}
    assert halved.scores == pytest.approx(whole.scores, abs=1e-6)
    assert halved.removal_order == whole.removal_order


def test_batches_of_one_cannot_be_halved(place: Path) -> None:
    model = ModelSpec(str(place / "model"))
    assert batch_sizes(EvaluationSpec(model=ModelRef(model)))["smaller"].batch_size == 4
    assert batch_sizes(EvaluationSpec(model=ModelRef(model), batch_size=1))["smaller"] is None
    generation = GenerationSpec(model=model, prompts=TextSpec(path="prompts.jsonl"), batch_size=3)
    assert responses.batch_sizes(generation)["smaller"].batch_size == 1
    assert responses.batch_sizes(replace(generation, batch_size=1))["smaller"] is None
