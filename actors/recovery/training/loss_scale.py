"""The loss scale of float16 training: as large as the gradients allow."""

from dataclasses import dataclass


@dataclass
class LossScale:
    """Factor on the loss that keeps small gradients from vanishing in float16.

    Halved whenever a gradient overflows, doubled after `window` steps in a row
    without one (Micikevicius et al., Mixed Precision Training, §3.2).

    Attributes:
        value: the factor now; 1 for the types that need none.
        steps_since_overflow: steps made at this factor.
    """

    value: float = 1.0
    window: int = 1000
    steps_since_overflow: int = 0

    @classmethod
    def for_float16(cls, initial_scale_power: int = 16, loss_scale_window: int = 1000) -> "LossScale":
        """Return the scale at the start of a float16 run; the names are DeepSpeed's."""
        return cls(2.0**initial_scale_power, loss_scale_window)

    @property
    def can_decrease(self) -> bool:
        """True if a gradient that is no number may be an overflow rather than a divergence."""
        return self.value > 1.0

    def decrease(self) -> None:
        self.value, self.steps_since_overflow = max(1.0, self.value / 2), 0

    def record_step(self, dynamic: bool) -> None:
        """Count a step without overflow; `dynamic` if the factor follows the gradients at all."""
        self.steps_since_overflow += 1
        if dynamic and self.steps_since_overflow >= self.window:
            self.value, self.steps_since_overflow = self.value * 2, 0
