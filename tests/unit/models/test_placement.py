"""One model over several devices: what goes where, and that numbers are those of one piece."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel

from actors.contracts import ModelRef, ModelSpec
from actors.errors import MemoryExhaustedError
from actors.evaluation.lm_eval.loglikelihood import LikelihoodModel, Scored
from actors.evaluation.perplexity import token_perplexity
from actors.models import build_model, find_layers, remove_layers, without_layers
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "mixtral", "falcon", "bloom", "mamba"])
def test_every_weight_has_one_place(family: str) -> None:
    model = tiny_model(family)
    over = [Place(torch.device("meta", i), int(ROOM * _num_bytes(model))) for i in range(2)]
    where = device_map(model, [Place(place.device, int(place.num_bytes * 0.6)) for place in over])
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    found = {name: [part for part in where if f"{name}.".startswith(f"{part}.")] for name in names}
    assert {name: parts for name, parts in found.items() if len(parts) != 1} == {}
    blocks = [where[f"{find_layers(model).path}.{i}"].index for i in range(len(find_layers(model).modules))]
    assert blocks == sorted(blocks)
    assert set(blocks) == {0, 1}
    outside = {name: where[name].index for name in where if not name.startswith(find_layers(model).path)}
    assert set(outside.values()) == {0}


def test_what_fits_on_one_device_stays_there() -> None:
    model = _llama()
    size = _num_bytes(model)
    first, second = Place(torch.device("meta", 0), 2 * size), Place(torch.device("meta", 1), 2 * size)
    assert device_map(model, [first, second]) == {"": first.device}
    assert device_map(model, [Place(first.device, size // 2)]) == {"": first.device}


def test_devices_are_filled_alike() -> None:
    model = _llama()
    blocks = [sum(p.numel() * 4 for p in block.parameters()) for block in find_layers(model).modules]
    outside = _num_bytes(model) - sum(blocks)
    large, small = outside + 3 * blocks[0], 5 * blocks[0] // 2
    over = [Place(torch.device("meta", i), size) for i, size in enumerate((large, small, small))]
    where = device_map(model, over)
    assert [where[f"model.layers.{i}"].index for i in range(6)] == [0, 0, 1, 1, 2, 2]


def test_too_little_memory_is_refused() -> None:
    model = _llama()
    over = [Place(torch.device("meta", i), _num_bytes(model) // 4) for i in range(3)]
    with pytest.raises(MemoryExhaustedError, match=r"3 devices have .* give the stage more gpus"):
        device_map(model, over)


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
