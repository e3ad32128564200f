"""Tests of models over devices that are made up; `tests/unit/models/test_placement.py` runs them.

In a process of their own, as a backend of torch that is registered once stays for all later tests.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel

from actors.contracts import ModelRef, ModelSpec
from actors.evaluation.lm_eval.loglikelihood import LikelihoodModel, Scored
from actors.evaluation.perplexity import token_perplexity
from actors.models import build_model, remove_layers, without_layers
from actors.models.offloading.dispatch import input_device
from actors.models.offloading.placement import Place, device_map
from actors.scoring import score_layers
from tests.support.made_up_devices import made_up, made_up_devices
from tests.support.tiny_models import save_tiny, tiny_ids, tiny_model

SEQUENCES = list(tiny_ids(3))
CRITERIA = (
    "hidden_cosine",
    "perplexity",
    "kl",
    "block_influence",
    "angular_block",
    "bridge_residual",
    "magnitude_l1",
)
ROOM = 1.35
"""Memory of the devices together, over what the weights take."""


def _llama() -> PreTrainedModel:
    """With attention as plain products: made-up devices have no kernels."""
    return tiny_model("llama", attn_implementation="eager")


def _num_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _over(model: PreTrainedModel, count: int) -> list[Place]:
    size = _num_bytes(model) if count == 1 else int(ROOM * _num_bytes(model) / count)
    return [Place(made_up(index), 2 * size if count == 1 else size) for index in range(count)]


def _placed(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """As transformers places what it reads with a device map."""
    over = _over(model, count)
    where = device_map(model, over)
    return dispatch_model(model, where, main_device=over[0].device, force_hooks=True)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_those_of_one_piece(criterion: str, count: int) -> None:
    expected = score_layers(_llama(), SEQUENCES, criterion)
    with made_up_devices():
        model = _placed(_llama(), count)
        assert {p.device.index for p in model.parameters()} == set(range(count))
        found = score_layers(model, [ids.to(made_up(0)) for ids in SEQUENCES], criterion)
    assert found == pytest.approx(expected, rel=1e-6)


def _likelihoods(model: PreTrainedModel) -> Any:
    requests = [Scored(ids.tolist(), ids[-3:].tolist()) for ids in SEQUENCES]
    return LikelihoodModel(model).loglikelihoods(requests)


def _perplexity(model: PreTrainedModel) -> Any:
    return token_perplexity(model, tiny_ids(1, 60)[0], 16)


def _generated(model: PreTrainedModel) -> Any:
    ids_BT = tiny_ids(2, 9).to(input_device(model))
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids_BT)}
    return model.generate(ids_BT, **settings).tolist()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("measure", [_likelihoods, _perplexity, _generated])
def test_evaluation_is_that_of_one_piece(measure: Callable[[PreTrainedModel], Any], count: int) -> None:
    """Also of a model whose blocks were removed after it was placed."""
    expected = measure(remove_layers(_llama(), [2]))
    with made_up_devices():
        found = measure(without_layers(_placed(_llama(), count), [2]))
    assert found == expected


def test_no_device_holds_more_than_its_share() -> None:
    with made_up_devices() as held:
        before = dict(held.now)
        model = _llama()
        over = _over(model, 4)
        _placed(model, 4)
        weights = {place.device.index: held.now[place.device.index] for place in over}
    for place in over:
        # Buffers are beside the weights.
        assert weights[place.device.index] - before.get(place.device.index, 0) <= place.num_bytes + 1024


def test_weights_are_read_onto_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its threads would not know of devices that are made up in this one.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    ref = replace(ModelRef(ModelSpec(save_tiny(tmp_path))), dropped=(1,))
    plain, _ = build_model(ref)
    expected = plain(tiny_ids()).logits
    with made_up_devices():
        placed, _ = build_model(ref, [Place(made_up(index), _num_bytes(plain) // 2) for index in range(4)])
        assert len({parameter.device for parameter in placed.parameters()}) > 1
        found = placed(tiny_ids().to(made_up(0))).logits.cpu()
    torch.testing.assert_close(found, expected)
