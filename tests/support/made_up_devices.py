"""Devices that are made up: tensors say that they are on one of them, and are computed on the CPU.

An operation over tensors of two devices fails, as on GPUs; what each device holds is counted.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        """No code under test is to choose these devices by itself."""
        return False


class _Backend(_DummyBackendModule):
    def is_available(self) -> bool:
        return False


_setup_privateuseone_for_python_backend("madeup", _Backend(), _Hook())

aten = torch.ops.aten
BETWEEN_DEVICES = {aten.copy_, aten._to_copy, aten.to}
INDEXING = {aten.index, aten.index_put_, aten._unsafe_index}
"""Index tensors may be on the CPU."""


def made_up(index: int) -> torch.device:
    """Return a made-up device."""
    return torch.device("madeup", index)


class Held:
    """Bytes on each made-up device, now and at most."""

    def __init__(self) -> None:
        self.now: Counter[int] = Counter()
        self.peak: Counter[int] = Counter()
        self._wrappers: Counter[tuple[int, int]] = Counter()

    def add(self, tensor: Tensor, value: Tensor) -> None:
        """Count the storage of `value`, which `tensor` stands for, until nothing stands for it."""
        storage, device = value.untyped_storage(), tensor.device.index or 0
        place, size = (device, storage.data_ptr()), storage.nbytes()
        if not self._wrappers[place]:
            self.now[device] += size
            self.peak[device] = max(self.peak[device], self.now[device])
        self._wrappers[place] += 1
        finalize(tensor, self._remove, place, size)

    def _remove(self, place: tuple[int, int], size: int) -> None:
        self._wrappers[place] -= 1
        if not self._wrappers[place]:
            self.now[place[0]] -= size


HELD = Held()


class MadeUpTensor(Tensor):
    """Stands on a made-up device for `value`, which is on the CPU."""

    value: Tensor

    @staticmethod
    def __new__(
        cls: type["MadeUpTensor"],
        value: Tensor,
        device: torch.device | None = None,
        requires_grad: bool = False,
    ) -> "MadeUpTensor":
        if isinstance(value, MadeUpTensor):
            value, device = value.value, value.device
        made: MadeUpTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=device,
            requires_grad=requires_grad,
        )
        made.value = value
        HELD.add(made, value)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Also what takes no tensor gives one of the device that it names."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """What goes past the dispatcher: making a tensor of numbers, also of indices, and numbers of a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func is Tensor.tolist and isinstance(args[0], MadeUpTensor):
            return args[0].value.tolist()
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            return func(args[0], torch.tensor(args[1]))
        return func(*args, **kwargs)


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    devices = {tensor.device for tensor in tensors if isinstance(tensor, MadeUpTensor)}
    wanted = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    target = wanted or next(iter(devices), None)
    if func.overloadpacket not in BETWEEN_DEVICES:
        alien = any(tensor.dim() for tensor in tensors if not isinstance(tensor, MadeUpTensor))
        if len(devices) > 1 or (devices and alien and func.overloadpacket not in INDEXING):
            raise RuntimeError(f"{func} over tensors on {[tensor.device for tensor in tensors]}")
    plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if func.overloadpacket.__name__.endswith("_"):
        return args[0]
    if target is None or target.type != "madeup":
        return out
    return tree_map(lambda x: MadeUpTensor(x, target) if isinstance(x, Tensor) else x, out)


def _plain(value: Any) -> Any:
    """Return what stands for the value on the CPU."""
    if isinstance(value, MadeUpTensor):
        return value.value
    is_made_up = isinstance(value, torch.device) and value.type == "madeup"
    return torch.device("cpu") if is_made_up else value


@contextmanager
def made_up_devices() -> Iterator[Held]:
    """Make devices up inside this context; count what they hold from now on."""
    HELD.peak = Counter(HELD.now)
    with torch.no_grad(), _Literals(), _Factories():
        yield HELD
