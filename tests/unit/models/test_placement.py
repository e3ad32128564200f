"""One model over several devices: what goes where, and that numbers are those of one piece."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from actors.errors import MemoryExhaustedError
from actors.models import find_layers
from actors.models.offloading.placement import Place, device_map
from tests.support.tiny_models import tiny_model

ROOM = 1.35
"""Memory of the devices together, over what the weights take."""


def _num_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


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
    model = tiny_model("llama")
    size = _num_bytes(model)
    first, second = Place(torch.device("meta", 0), 2 * size), Place(torch.device("meta", 1), 2 * size)
    assert device_map(model, [first, second]) == {"": first.device}
    assert device_map(model, [Place(first.device, size // 2)]) == {"": first.device}


def test_devices_are_filled_alike() -> None:
    model = tiny_model("llama")
    blocks = [sum(p.numel() * 4 for p in block.parameters()) for block in find_layers(model).modules]
    outside = _num_bytes(model) - sum(blocks)
    large, small = outside + 3 * blocks[0], 5 * blocks[0] // 2
    over = [Place(torch.device("meta", i), size) for i, size in enumerate((large, small, small))]
    where = device_map(model, over)
    assert [where[f"model.layers.{i}"].index for i in range(6)] == [0, 0, 1, 1, 2, 2]


def test_too_little_memory_is_refused() -> None:
    model = tiny_model("llama")
    over = [Place(torch.device("meta", i), _num_bytes(model) // 4) for i in range(3)]
    with pytest.raises(MemoryExhaustedError, match=r"3 devices have .* give the stage more gpus"):
        device_map(model, over)


def test_numbers_over_several_devices_are_those_of_one_piece() -> None:
    """Scores, likelihoods, generated texts, and what each device holds; see the file."""
    root = Path(__file__).parents[3]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/support/placed_models.py",
    ]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:]
