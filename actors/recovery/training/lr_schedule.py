"""The learning rate of every optimizer step: a pure function, so that a resumed run repeats it."""

import math
from collections.abc import Callable

from actors.errors import unknown_name

LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Factor of the peak rate by the share of the steps after warm-up that is done, 0..1."""


def lr_at(step: int, num_steps: int, peak: float, schedule: str, warmup_steps: int = 0) -> float:
    """Return the learning rate of step `step` (from 0) of `num_steps`.

    It rises linearly over the warm-up, reaching `peak` at its end, then follows
    the schedule; a decay would reach 0 one step after the last.

    Raises:
        RequestError: no schedule of that name.
    """
    if schedule not in LR_SCHEDULES:
        raise unknown_name("learning rate schedule", schedule, LR_SCHEDULES)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * LR_SCHEDULES[schedule]((step - warmup_steps) / max(1, num_steps - warmup_steps))
