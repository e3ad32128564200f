"""Placing one model over the devices that a process holds: blocks in order, the rest on the first device.

Embeddings, final norm and head are small beside the blocks, and what enters and leaves the model is then on
one device. accelerate's hooks take hidden states to each block's device.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.errors import MemoryExhaustedError
from actors.models.families import find_layers

GIB = 2**30

WEIGHTS_SHARE = 0.7
"""Share of a device that weights may fill; hidden states and caches need the rest."""


@dataclass(frozen=True)
class Place:
    """A device and the bytes that are free on it."""

    device: torch.device
    num_bytes: int


def places() -> tuple[Place, ...]:
    """Return the accelerators that this process was given; none on a CPU, where models are loaded anyway."""
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return tuple(Place(device, torch.cuda.mem_get_info(device)[0]) for device in found)


def device_map(model: PreTrainedModel, over: Sequence[Place]) -> dict[str, torch.device]:
    """Return which module goes where, as transformers takes it: to one device what one can hold.

    Else blocks go to the devices in order, all filled to the same share of their memory.

    Args:
        model: with weights or without, in the type that it is to be loaded in.

    Raises:
        MemoryExhaustedError: the devices together cannot hold the weights.
    """
    layers = find_layers(model)
    sizes = [_num_bytes(block.parameters()) for block in layers.modules]
    total, free = _num_bytes(model.parameters()), [place.num_bytes for place in over]
    if total <= WEIGHTS_SHARE * free[0] or len(over) == 1:
        return {"": over[0].device}
    for percent in range(1, 101):
        of_block = _filled(sizes, total - sum(sizes), [size * percent // 100 for size in free])
        if of_block is not None:
            break
    else:
        raise MemoryExhaustedError(
            f"the weights take {total / GIB:.3g} GiB, and {len(over)} devices have {sum(free) / GIB:.3g} GiB "
            "free; give the stage more gpus, or score with scoring.stream_weights"
        )
    parts = {f"{layers.path}.{block}": over[index].device for block, index in enumerate(of_block)}
    return dict.fromkeys(_outside(model, layers.path), over[0].device) | parts


def _filled(sizes: Sequence[int], outside: int, limits: Sequence[int]) -> list[int] | None:
    """Return the device of each block when each is filled up to its limit, the first with `outside` before.

    None if they do not hold all.
    """
    device, held = 0, outside
    of_block = []
    for size in sizes:
        while held + size > limits[device]:
            device, held = device + 1, 0
            if device == len(limits):
                return None
        of_block.append(device)
        held += size
    return of_block if outside <= limits[0] else None


def _num_bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _outside(model: PreTrainedModel, path: str) -> list[str]:
    """Return the largest modules, and the parameters beside them, that hold no block."""
    above = {".".join(path.split(".")[:end]) for end in range(path.count(".") + 2)}
    names = [name for name, _ in model.named_modules() if name not in above]
    names = [name for name in names if name.rpartition(".")[0] in above and not name.startswith(f"{path}.")]
    own = [f"{name}." if name else "" for name in above if name != path]
    return names + [
        prefix + name
        for prefix in own
        for name, _ in model.get_submodule(prefix.rstrip(".")).named_parameters(recurse=False)
    ]
