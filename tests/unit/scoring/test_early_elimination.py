"""Early elimination against its promises, on drawn scores."""

import pytest
import torch

from actors.scoring.early_elimination import student_t, surviving_candidates


@pytest.mark.parametrize(
    ("level", "freedom", "want"),
    [(0.95, 5, 2.015), (0.99, 15, 2.602), (0.999, 15, 3.733), (0.9999, 31, 4.221), (0.975, 1000, 1.962)],
)
def test_students_t(level: float, freedom: int, want: float) -> None:
    """Against the printed tables."""
    assert student_t(level, freedom) == pytest.approx(want, rel=2e-3)


def test_clear_losers_go_and_the_close_stay() -> None:
    noise_SC = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    rows_SC = torch.tensor([0.0, 5.0, 4.99, 1.0]) + noise_SC
    assert surviving_candidates(rows_SC, 1, 0.99, looks=8) == [1, 2]
    assert surviving_candidates(rows_SC, 3, 0.99, looks=8) == [1, 2, 3]
    assert surviving_candidates(rows_SC, 4, 0.99, looks=8) == [0, 1, 2, 3]


def test_what_sequences_have_in_common_does_not_hide_a_difference() -> None:
    """Differences are taken sequence by sequence."""
    generator = torch.Generator().manual_seed(0)
    common_S1 = 100 * torch.randn(32, 1, generator=generator)
    rows_SC = common_S1 + torch.tensor([1.0, 0.0]) + 0.1 * torch.randn(32, 2, generator=generator)
    assert surviving_candidates(rows_SC, 1, 0.99, looks=8) == [0]


def test_equal_candidates_all_stay() -> None:
    assert surviving_candidates(torch.ones(16, 3), 1, 0.9, looks=4) == [0, 1, 2]


def test_the_winner_is_lost_no_more_often_than_allowed() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0.2, 0.1, 0.0, 0.0])
    lost = 0
    for _ in range(200):
        rows_SC, left = truth + torch.randn(128, 4, generator=generator), [0, 1, 2, 3]
        for seen in range(16, 128, 16):
            left = [left[c] for c in surviving_candidates(rows_SC[:seen, left], 1, 0.9, looks=8)]
        lost += 0 not in left
    assert lost <= 0.1 * 200
