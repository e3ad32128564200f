"""Bounds and screening against plain exhaustive scoring: the layers that go next are the same."""

import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from actors.contracts import ModelRef, ModelSpec, ScoreResult, ScoreSpec, TextSpec
from actors.scoring import Scorer
from actors.scoring.elimination import contenders, leaders
from actors.scoring.measures.memory_budget import GIB, costs_of
from actors.scoring.measures.reference import Reference
from actors.scoring.score import Shard, ShardScores, run_shards
from tests.support.tiny_models import blocks_of, skipped, tiny_ids, tiny_model

FEW, MANY = 40, 200
RANDOM_FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "falcon")
CRITERIA = ("hidden_cosine", "hidden_cosine", "perplexity", "kl")
WAYS: dict[str, dict[str, Any]] = {
    "bounds": {"eliminate": True},
    "screening": {"screen_dtype": "bfloat16"},
    "both": {"eliminate": True, "screen_dtype": "bfloat16"},
}


@cache
def _models(seed: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random model and one like it to compare with; blocks of very different weight, some of none."""
    draw, family = random.Random(seed), RANDOM_FAMILIES[seed % len(RANDOM_FAMILIES)]
    model, reference = (tiny_model(family, seed) for _ in range(2))
    empty = draw.sample(range(6), k=draw.choice((0, 0, 2)))
    with torch.no_grad():
        for index, (block, other) in enumerate(zip(blocks_of(model), blocks_of(reference), strict=True)):
            factor = 0.0 if index in empty else draw.uniform(0.2, 1.0)
            for weight, theirs in zip(block.parameters(), other.parameters(), strict=True):
                if weight.dim() > 1 or not factor:
                    weight.mul_(factor)
                theirs.copy_(weight)
        # The reference is another model, as the unpruned one is to a pruned one.
        for weight in blocks_of(reference)[draw.randrange(6)].parameters():
            weight.mul_(1.1)
    return model, reference


def _sequences(seed: int) -> list[Tensor]:
    """Of two lengths, 20 in all."""
    return [*tiny_ids(12, 9, seed), *tiny_ids(8, 5, seed + 1)]


def _scorer(seed: int, criterion: str, num_remove: int, **settings: Any) -> Scorer:
    """A scorer of models in memory."""
    model, reference = _models(seed)
    spec = ScoreSpec(
        model=ModelRef(ModelSpec("in-memory")),
        calibration=TextSpec(builtin="none"),
        criterion=criterion,
        num_remove=num_remove,
        **settings,
    )
    scorer = Scorer(spec)
    given = {"_model": model, "sequences": _sequences(seed), "source_layers": tuple(range(6))}
    other = Reference(lambda: reference) if seed % 2 else Reference()
    scorer.__dict__.update(given | {"_reference": other})
    return scorer


def _run(scorer: Scorer, count: int = 1, at_least: int = 1) -> ScoreResult:
    def compute(shards: list[Shard]) -> Iterator[tuple[Shard, ShardScores]]:
        return ((shard, scorer.score(shard)) for shard in reversed(shards))

    return run_shards(scorer, compute, count, at_least)


@torch.no_grad()
def _plain_scores(seed: int, criterion: str) -> list[float]:
    """Every model with one block less, whole, on every sequence."""
    model, other = _models(seed)
    reference = other if seed % 2 else model
    scores = []
    for layer in range(6):
        total = weight = 0.0
        for length in (9, 5):
            ids_BT = torch.stack([ids for ids in _sequences(seed) if len(ids) == length])
            want = reference(ids_BT, output_hidden_states=True, use_cache=False)
            with skipped(model, [layer]):
                got = model(ids_BT, output_hidden_states=True, use_cache=False)
            if criterion == "hidden_cosine":
                a, b = (out.hidden_states[-1].double().flatten(1) for out in (want, got))
                total, weight = total + cosine_similarity(a, b).sum().item(), weight + len(ids_BT)
                continue
            p, q = (out.logits.double().log_softmax(-1) for out in (want, got))
            if criterion == "kl":
                total, weight = total + (p.exp() * (p - q)).sum().item(), weight + ids_BT.numel()
            else:
                targets = ids_BT[:, 1:].flatten()
                total += cross_entropy(q[:, :-1].flatten(0, 1), targets, reduction="sum").item()
                weight += len(targets)
        scores.append(total / weight)
    return torch.tensor(scores).exp().tolist() if criterion == "perplexity" else scores


def _plain_choice(scores: Sequence[float], criterion: str, count: int) -> list[int]:
    """The best so many, one by one; of those as good as the best but for a millionth, the deepest."""
    good = [score if criterion == "hidden_cosine" else -score for score in scores]
    chosen: list[int] = []
    for _ in range(count):
        left = [i for i in range(len(good)) if i not in chosen]
        best = max(good[j] for j in left)
        chosen.append(max(i for i in left if good[i] >= best - 1e-6 * max(1, abs(best))))
    return chosen


def _clear(scores: Sequence[float], criterion: str, count: int) -> bool:
    """Rounding does not decide: the choice is that of a tolerance half and of one twice as large."""
    good = sorted((score if criterion == "hidden_cosine" else -score) for score in scores)[::-1]
    gaps = [(a - b) / max(1, abs(a)) for a, b in pairwise(good[: count + 2])]
    return all(gap < 2e-7 or gap > 5e-6 for gap in gaps)


def _check(seeds: range) -> dict[str, list[int]]:
    """Compare all ways with the plain scores; return each way's layer-forwards, for all models."""
    spent: dict[str, list[int]] = {}
    for seed in seeds:
        criterion, count = CRITERIA[seed % len(CRITERIA)], 1 + seed % 3 // 2
        want = _plain_scores(seed, criterion)
        exhaustive = _run(_scorer(seed, criterion, count))
        assert exhaustive.scores == pytest.approx(want, rel=1e-4, abs=1e-5)
        spent.setdefault("exhaustive", []).append(exhaustive.layer_forwards)
        for name, settings in WAYS.items():
            result = _run(_scorer(seed, criterion, count, **settings))
            if _clear(want, criterion, count):
                chosen = list(result.removal_order[:count])
                assert chosen == _plain_choice(want, criterion, count), (seed, name, want, result)
            _check_kinds(result, want, criterion)
            spent.setdefault(name, []).append(result.layer_forwards)
        assert spent["bounds"][-1] <= spent["exhaustive"][-1]
    return spent


def _check_kinds(result: ScoreResult, want: Sequence[float], criterion: str) -> None:
    """Exact scores are right, and bounds are bounds."""
    kinds = result.kinds or ("exact",) * len(want)
    assert sorted(result.removal_order) == list(range(len(want)))
    sign = 1 if criterion == "hidden_cosine" else -1
    for score, right, kind in zip(result.scores, want, kinds, strict=True):
        if kind == "exact":
            assert score == pytest.approx(right, rel=1e-4, abs=1e-5)
        if kind == "bound":
            assert sign * score >= sign * right - 1e-5


def test_random_models_lose_the_same_layers() -> None:
    spent = _check(range(FEW))
    assert len(spent["bounds"]) == FEW
    assert sum(spent["bounds"]) < 0.9 * sum(spent["exhaustive"])


@pytest.mark.long
def test_many_random_models_lose_the_same_layers() -> None:
    spent = _check(range(FEW, FEW + MANY))
    assert sum(spent["bounds"]) < 0.9 * sum(spent["exhaustive"])


@pytest.mark.parametrize(("count", "at_least"), [(3, 1), (8, 2), (50, 40)])
def test_shares_of_a_pool_change_no_choice(count: int, at_least: int) -> None:
    for seed, settings in enumerate(WAYS.values()):
        criterion = CRITERIA[seed % len(CRITERIA)]
        alone = _run(_scorer(seed, criterion, 1, **settings))
        shared = _run(_scorer(seed, criterion, 1, **settings), count, at_least)
        assert shared.removal_order == alone.removal_order
        assert shared.kinds == alone.kinds
        assert shared.scores == pytest.approx(alone.scores, rel=1e-2)


def test_the_reference_in_float32_is_passed_once() -> None:
    """Screening takes it through the model that then confirms from what it left at each layer."""
    scorer = _scorer(0, "hidden_cosine", 1, screen_dtype="bfloat16")
    result = _run(scorer)
    confirmed = [i for i, kind in enumerate(result.kind_of_each) if kind == "exact"]
    screening = 20 * (6 * 7 // 2 - 1)
    assert result.layer_forwards == screening + 20 * (6 + sum(5 - i for i in confirmed))


def test_no_cell_and_no_unpruned_layer_is_passed_twice() -> None:
    """What is not passed is what the unknown cells would have cost."""
    exhaustive, bounded = (_run(_scorer(0, "hidden_cosine", 1, eliminate=on)) for on in (False, True))
    assert exhaustive.layer_forwards == 20 * 6 * 7 // 2
    assert bounded.layer_forwards_saved > 0
    assert bounded.layer_forwards + bounded.layer_forwards_saved == exhaustive.layer_forwards
    assert not exhaustive.kinds
    assert set(bounded.kinds) == {"exact", "bound"}


def test_without_room_streams_are_computed_again() -> None:
    least = 1.1 * costs_of(_models(0)[0]).least(9)
    scarce = _scorer(0, "hidden_cosine", 1, eliminate=True, memory_budget_gb=least / GIB)
    want, got = _run(_scorer(0, "hidden_cosine", 1, eliminate=True)), _run(scarce)
    assert got.removal_order == want.removal_order
    assert got.scores == pytest.approx(want.scores, abs=1e-6)
    assert got.layer_forwards > want.layer_forwards


def test_contenders() -> None:
    best_C = torch.tensor([0.9, 0.8, 0.85, 0.8 - 5e-7, 0.7])
    finished_C = torch.tensor([False, True, True, False, False])
    assert contenders(best_C, finished_C, 1, 1e-6) == [0, 2]
    assert contenders(best_C, finished_C, 2, 1e-6) == [0, 1, 2, 3]
    assert contenders(best_C, finished_C, 3, 1e-6) == [0, 1, 2, 3, 4]
    assert leaders(torch.tensor([0.1, 0.3, 0.2, 0.3]), [0, 2, 3], 2) == [3, 2]
    assert leaders(torch.tensor([0.1, 0.3]), [0, 1], 5) == [1, 0]


def test_the_reference_is_computed_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    model, sequences = _models(1)[1], _sequences(1)
    loads: list[int] = []

    def load() -> PreTrainedModel:
        loads.append(1)
        return model

    counted = cast(Any, _Counter())
    first = Reference(load, kept_as="a model").last_hiddens(sequences[:3], None, counted)
    again = Reference(load, kept_as="a model").last_hiddens(sequences[:3], None, counted)
    assert (len(loads), counted.layer_forwards) == (1, 3 * 6)
    assert first is not None
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = Reference(load, kept_as="another").last_hiddens(sequences[:1], None, counted)
    assert other is not None
    assert len(loads) == 2
    assert Reference().last_hiddens(sequences, None, counted) is None


class _Counter:
    layer_forwards = 0
