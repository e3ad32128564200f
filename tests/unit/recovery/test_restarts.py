"""How a training goes on after the loss of workers, decided without any."""

import pytest

from actors.errors import WorkError
from actors.recovery.training.failures import FEWER_START_S, Restarts, is_lost_peer, worker_counts


def test_a_batch_can_be_divided_among_its_divisors() -> None:
    assert worker_counts(8, 8) == [8, 4, 2, 1]
    assert worker_counts(12, 6) == [6, 4, 3, 2, 1]
    assert worker_counts(7, 7) == [7, 1]
    assert worker_counts(8, 1) == [1]


def test_without_a_limit_lost_workers_are_waited_for() -> None:
    restarts = Restarts([4, 2, 1], max_failures=2)
    assert (restarts.count, restarts.timeout_s) == (4, None)
    assert [restarts.go_on_after_loss(announced=False) for _ in range(3)] == [True, True, False]
    assert (restarts.count, restarts.timeout_s) == (4, None)


def test_announced_losses_are_no_failures() -> None:
    restarts = Restarts([2, 1], max_failures=0)
    assert all(restarts.go_on_after_loss(announced=True) for _ in range(10))
    assert not restarts.go_on_after_loss(announced=False)


def test_without_a_replacement_fewer_go_on_and_all_are_tried_again_after_the_next_loss() -> None:
    restarts = Restarts([4, 2, 1], max_failures=3, replacement_timeout_s=300.0)
    tried = []
    for step in ("loss", "no place", "no place", "loss", "no place"):
        assert restarts.go_on_after_loss(False) if step == "loss" else restarts.go_on_without_places()
        tried.append((restarts.count, restarts.timeout_s))
    fewer = FEWER_START_S
    assert tried == [(4, 300.0), (2, fewer), (1, fewer), (4, 300.0), (2, fewer)]
    assert restarts.missing_s == 300 + fewer + 300


def test_with_no_place_for_a_single_worker_all_wait_as_at_first() -> None:
    restarts = Restarts([2, 1], max_failures=3, start_timeout_s=600.0, replacement_timeout_s=60.0)
    restarts.go_on_after_loss(False)
    assert [restarts.go_on_without_places() for _ in range(3)] == [True, True, False]
    assert (restarts.count, restarts.timeout_s) == (2, 600.0)


def test_no_places_at_the_first_start_end_the_wait() -> None:
    assert not Restarts([2, 1], 3, start_timeout_s=10.0, replacement_timeout_s=5.0).go_on_without_places()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:1"), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp: remote process exited"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("no such peer"), False),
        (WorkError("the peer has no disk left"), False),
    ],
)
def test_a_lost_peer_is_told_from_an_error_of_ones_own(error: Exception, lost: bool) -> None:
    assert is_lost_peer(error) is lost
