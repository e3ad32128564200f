"""How much of its devices' arithmetic a training uses: model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311).

The operations are counted where they are done, in the forward and backward pass of one micro-batch, so
that shared passes, caches and frozen weights count as what they are; blocks that
gradient checkpointing computes again count twice.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
"""Products that the registry knows by their other form only."""

TFLOP = 1e12

PEAK_TFLOPS = {
    "B200": (2250.0, 1125.0),
    "GH200": (989.0, 495.0),
    "H200": (989.0, 495.0),
    "H100 PCIe": (756.0, 378.0),
    "H100": (989.0, 495.0),
    "A100": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "L4": (121.0, 60.0),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 62.5),
    "V100": (125.0, 15.7),
}
"""By part of the device's name: its peak of dense products in 16 bits, and of float32 by TF32, as its maker
states them. The first that fits counts."""


class FlopCounter(TorchDispatchMode):
    """While it is active, counts the operations of matrix products; forward and backward.

    Attributes:
        flops: a multiplication and an addition are two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        output = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        formula = flop_registry.get(IN_PLACE.get(packet, packet))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        return output


def peak_flops(device: torch.device, dtype: str) -> float:
    """Return the peak of a device in operations a second; 0 where it is not known, as for CPUs."""
    if device.type != "cuda":
        return 0.0
    return peak_of(torch.cuda.get_device_name(device), dtype)


def peak_of(name: str, dtype: str) -> float:
    """Return the peak of the device of that name."""
    found = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), (0.0, 0.0))
    return TFLOP * found[dtype == "float32"]
