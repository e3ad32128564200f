"""Steps whose numbers are still on the device, and what they become once they are read."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from actors.contracts import StepRecord


@dataclass(frozen=True)
class PendingStep:
    """An optimizer step that the device has been told to make.

    Attributes:
        terms: the loss terms, means over the whole batch, on the device; `loss` among them.
        grad_norm: of the gradient before clipping, on the device.
        started: when the host began with it, on the clock of `time.perf_counter`.
    """

    step: int
    tokens: int
    terms: Mapping[str, Tensor]
    grad_norm: Tensor
    learning_rate: float
    loss_scale: float = 1.0
    overflows: int = 0
    started: float = field(default_factory=time.perf_counter)


def read_steps(pending: Sequence[PendingStep], peak_memory_bytes: int = 0) -> list[StepRecord]:
    """Return the records of steps, their numbers read from the device all at once.

    The host waits there for the device, so only the time of all steps together is known: each has its mean.
    """
    if not pending:
        return []
    values = torch.stack(
        [torch.stack([*step.terms.values(), step.grad_norm.to(step.terms["loss"])]) for step in pending]
    ).tolist()
    seconds = (time.perf_counter() - pending[0].started) / len(pending)
    records = []
    for step, (*terms, grad_norm) in zip(pending, values, strict=True):
        named = dict(zip(step.terms, terms, strict=True))
        records.append(
            StepRecord(
                step=step.step,
                tokens=step.tokens,
                loss=named.pop("loss"),
                terms=tuple(named.items()),
                learning_rate=step.learning_rate,
                grad_norm=grad_norm,
                seconds=seconds,
                peak_memory_bytes=peak_memory_bytes,
                loss_scale=step.loss_scale,
                overflows=step.overflows,
            )
        )
    return records
