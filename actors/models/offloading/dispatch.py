"""Models that accelerate has dispatched: forwards wrapped in hooks, weights offloaded to the CPU or to disk.

accelerate puts its wrapper into the module itself, where it hides the forward of the class,
and an offloaded parameter is on the meta device except while that wrapper runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have the module compute `forward` inside this context, and its former function afterwards."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that `model` takes its inputs on: that of its first weight, offloaded or not."""
    if model.device.type != "meta":
        return model.device
    places = (hook.execution_device for part in model.modules() for hook in _hooks(part))
    return torch.device(next((place for place in places if place is not None), "meta"))


@contextmanager
def loaded_weights(module: nn.Module) -> Iterator[None]:
    """Keep the module's offloaded weights on the device where it computes, inside this context."""
    offloading = [(part, hook) for part in module.modules() for hook in _hooks(part) if hook.offload]
    loaded: list[tuple[nn.Module, AlignDevicesHook]] = []
    try:
        for part, hook in offloading:
            hook.pre_forward(part)
            hook.offload = False
            loaded.append((part, hook))
        yield
    finally:
        for part, hook in loaded:
            hook.offload = True
            hook.post_forward(part, None)


def _hooks(module: nn.Module) -> Iterator[AlignDevicesHook]:
    def single(hook: ModelHook | None) -> Iterator[ModelHook | None]:
        if isinstance(hook, SequentialHook):
            for part in hook.hooks:
                yield from single(part)
        else:
            yield hook

    return (hook for hook in single(getattr(module, "_hf_hook", None)) if isinstance(hook, AlignDevicesHook))
