"""A step asks the device for no number: on a GPU the host would have to wait for it there."""

import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from actors.contracts import LossSpec, RecoverySpec
from actors.recovery.training.engine import Engine
from actors.recovery.training.local import recover_locally

ASKING = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.nonzero,
}
"""Operations whose result the host cannot know, or size, before the device is done."""


class _Asked(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._overloadpacket in ASKING or (
            func._overloadpacket is torch.ops.aten.index and _by_mask(args)
        ):
            caller = traceback.extract_stack(limit=3)[0]
            self.operations.append(f"{func} in {caller.filename}:{caller.lineno}")
        return func(*args, **(kwargs or {}))


def _by_mask(args: tuple[Any, ...]) -> bool:
    """Return whether rows are picked by a mask: how many they are is known to the device alone."""
    return any(index is not None and index.dtype == torch.bool for index in args[1])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": LossSpec(hidden=0, attention=0, logit_loss="forward_kl")},
        {"objective": "healing"},
        {"objective": "healing_aux"},
    ],
    ids=["kd", "forward_kl", "healing", "healing_aux"],
)
def test_no_step_waits_for_the_device(
    tiny_spec: RecoverySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    asked, calls = _Asked(), []

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(method.__name__)
            # The first step makes what lasts: AdamW's state, and what DeepSpeed keeps.
            if "step" not in calls[:-1]:
                return method(*args, **kwargs)
            with asked:
                return method(*args, **kwargs)

        return call

    for name in ("accumulate", "step", "mean_over_workers"):
        monkeypatch.setattr(Engine, name, watched(getattr(Engine, name)))
    recover_locally(replace(tiny_spec, **changes), str(tmp_path / "a"), tmp_path / "work")
    assert calls.count("step") == 6
    assert asked.operations == []
