"""Learning rate schedules at the points where they are known by hand."""

import pytest

from actors.errors import RequestError
from actors.recovery.training.lr_schedule import lr_at


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 0, [1.0, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1.0, 0.8535533906, 0.5, 0.1464466094]),
        ("linear", 2, [0.5, 1.0, 1.0, 0.5]),
        ("constant", 9, [1 / 9, 2 / 9, 3 / 9, 4 / 9]),
    ],
)
def test_rates_of_four_steps(schedule: str, warmup: int, expected: list[float]) -> None:
    got = [lr_at(step, 4, 1.0, schedule, warmup) for step in range(4)]
    assert got == pytest.approx(expected)


def test_an_unknown_schedule_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RequestError, match=r"'cosin'.*cosine"):
        lr_at(0, 1, 1.0, "cosin")
