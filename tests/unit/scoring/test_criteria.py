"""Each criterion against a plain loop over candidates and tokens."""

import math
from collections.abc import Callable
from statistics import mean

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.errors import RequestError
from actors.scoring import CRITERIA, POOLING, find_criterion, score_layers
from actors.scoring.criteria import removal_order
from tests.support.tiny_models import blocks_of, skipped, tiny_ids, tiny_llama, tiny_model
from tests.unit.scoring.plain import cosine, last_hidden

SEQUENCES = [tiny_ids(1, length, seed=length)[0] for length in (12, 7, 3)]


def _pool_flatten(a_TD: Tensor, b_TD: Tensor) -> float:
    return cosine(a_TD.flatten().tolist(), b_TD.flatten().tolist())


def _pool_token_mean(a_TD: Tensor, b_TD: Tensor) -> float:
    return mean(cosine(a, b) for a, b in zip(a_TD.tolist(), b_TD.tolist(), strict=True))


def _pool_last_token(a_TD: Tensor, b_TD: Tensor) -> float:
    return cosine(a_TD[-1].tolist(), b_TD[-1].tolist())


SLOW_POOLING = {"flatten": _pool_flatten, "token_mean": _pool_token_mean, "last_token": _pool_last_token}


def _hidden_cosine_slowly(
    model: PreTrainedModel, reference: PreTrainedModel, pool: Callable[[Tensor, Tensor], float]
) -> list[float]:
    scores = []
    for layer in range(len(blocks_of(model))):
        similarities = []
        for ids_T in SEQUENCES:
            want = last_hidden(reference, ids_T)
            with skipped(model, [layer]):
                similarities.append(pool(want, last_hidden(model, ids_T)))
        scores.append(mean(similarities))
    return scores


def test_every_pooling_is_tested() -> None:
    assert SLOW_POOLING.keys() == POOLING.keys()


@pytest.mark.parametrize("other_reference", [False, True])
@pytest.mark.parametrize("pooling", SLOW_POOLING)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hidden_cosine(family: str, pooling: str, other_reference: bool) -> None:
    model = tiny_model(family)
    reference = tiny_model(family, seed=1) if other_reference else None
    scores = score_layers(model, SEQUENCES, "hidden_cosine", reference=reference, pooling=pooling)
    want = _hidden_cosine_slowly(model, reference or model, SLOW_POOLING[pooling])
    assert scores == pytest.approx(want, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("room", [None, 100_000])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_perplexity(family: str, room: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 caps its logits, which the head alone would not; a sequence of one token predicts nothing."""
    if room:
        monkeypatch.setattr("actors.scoring.measures.likelihood.LOGITS_BYTES", room)
    model = tiny_model(family)
    sequences = [*SEQUENCES, tiny_ids(1, 1)[0]]
    want = []
    for layer in range(6):
        nats, count = 0.0, 0
        for ids_T in sequences:
            with skipped(model, [layer]):
                log_p = model(ids_T[None], use_cache=False).logits[0].double().log_softmax(-1)
            nats -= math.fsum(log_p[t, ids_T[t + 1]].item() for t in range(len(ids_T) - 1))
            count += len(ids_T) - 1
        want.append(math.exp(nats / count))
    scores = score_layers(model, sequences, "perplexity")
    assert scores == pytest.approx(want, rel=1e-5)
    order = removal_order(scores, CRITERIA["perplexity"].highest_first)
    assert order[0] == min(range(6), key=lambda layer: want[layer])


@pytest.mark.parametrize(
    ("criterion", "order"), [("deepest", [4, 3, 2, 1, 0, 5]), ("reverse", [5, 4, 3, 2, 1, 0])]
)
def test_orders_by_depth(criterion: str, order: list[int]) -> None:
    scores = score_layers(tiny_model("llama"), [], criterion)
    assert removal_order(scores, CRITERIA[criterion].highest_first) == order


def test_random_depends_on_the_seed_alone() -> None:
    model = tiny_model("llama")
    draws = [tuple(score_layers(model, [], "random", seed=seed)) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
    assert draws[0] == tuple(score_layers(tiny_model("gpt2"), SEQUENCES, "random", seed=0))


@pytest.mark.parametrize("criterion", ["hidden_cosine", "block_influence", "angular_block"])
@pytest.mark.parametrize("layer", [0, 2, 5])
def test_a_block_that_does_nothing_goes_first_wherever_it_is(layer: int, criterion: str) -> None:
    """The first and the last layer are candidates like the others."""
    model = tiny_model("llama")
    block = model.model.layers[layer]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    scores = score_layers(model, SEQUENCES, criterion)
    assert len(scores) == 6
    assert scores[layer] == pytest.approx(1 if criterion == "hidden_cosine" else 0, abs=1e-6)
    assert removal_order(scores, CRITERIA[criterion].highest_first)[0] == layer


def test_a_model_of_one_block_can_be_scored() -> None:
    model, _ = tiny_llama(num_layers=1)
    assert len(score_layers(model, SEQUENCES)) == 1


def test_removal_order() -> None:
    assert removal_order([0.1, 0.9, 0.5], highest_first=True) == [1, 2, 0]
    assert removal_order([0.1, 0.9, 0.5], highest_first=False) == [0, 2, 1]


@pytest.mark.parametrize("highest_first", [True, False])
def test_ties_go_to_the_deeper_layer(highest_first: bool) -> None:
    assert removal_order([0.5, 0.5, 0.5], highest_first) == [2, 1, 0]
    noise = 4e-7 if highest_first else -4e-7
    assert removal_order([0.5 + noise, 0.5, 0.5 - noise], highest_first) == [2, 1, 0]
    assert removal_order([0.5 + 10 * noise, 0.5], highest_first) == [0, 1]
    # A perplexity of hundreds has no sixth decimal in float32.
    assert removal_order([600 + 600 * noise, 600, 600 - 600 * noise], highest_first) == [2, 1, 0]
    assert removal_order([600 + 6000 * noise, 600], highest_first) == [0, 1]


def test_a_run_of_layers_goes_in_order_and_must_fit() -> None:
    """A run of 2 begins at the best of the layers 0, 1 and 2; layer 3 is the last and cannot begin one."""
    assert removal_order([0.3, 0.1, 0.2, 0.0], highest_first=False, run=2) == [1, 2, 3, 0]
    assert removal_order([0.1, 0.1, 0.1, 0.1], highest_first=False, run=3) == [1, 2, 3, 0]
    assert removal_order([0.0, 0.5, 0.5, 0.5], highest_first=False, run=4) == [0, 1, 2, 3]


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(RequestError, match="layer 1 scored NaN; score in float32 or bfloat16"):
        removal_order([0.5, math.nan, 0.2], highest_first=True)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RequestError, match="unknown criterion 'hiden_cosine'; did you mean hidden_cosine"):
        find_criterion("hiden_cosine")
    with pytest.raises(RequestError, match="unknown pooling 'first_token'; did you mean last_token"):
        score_layers(tiny_model("llama"), SEQUENCES, pooling="first_token")
