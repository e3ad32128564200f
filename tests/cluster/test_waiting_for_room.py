"""What waits for room on a cluster waits as long as it takes, and says for what."""

import threading
import time
from collections.abc import Sequence

import pytest
import ray

from actors.contracts import ActorPoolSpec, Progress, WaitingTime
from actors.errors import WorkError
from actors.ray_pool import STARTING_S, ActorPool, result_of, run_in_task

pytestmark = pytest.mark.usefixtures("ray_two_cpus")

HELD_S = 9.0


class Worker:
    """An actor that works at once."""

    def work(self, number: int) -> int:
        """Return twice the number."""
        return 2 * number


class Recorder:
    """A progress that keeps what it is called with."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.places: list[Sequence[str]] = []
        self.waited_s = 0.0

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        pass

    def waits_for(self, reason: str) -> None:
        self.reasons.append(reason)

    def runs_on(self, places: Sequence[str]) -> None:
        self.places.append(places)

    def waited(self, seconds: float) -> None:
        self.waited_s += seconds

    def restarted(self, what: str) -> None:
        pass

    def stop_requested(self) -> bool:
        return False


def hold_all(seconds: float) -> None:
    """Have another process hold both CPUs for so long."""
    other = ray.remote(num_cpus=2)(Worker).remote()
    ray.get(other.work.remote(1))
    threading.Timer(seconds, ray.kill, (other,)).start()


def pooled(number: int, progress: Progress) -> int:
    with ActorPool(ActorPoolSpec(2, 1, 0), Worker, setting="scoring", progress=progress) as pool:
        return sum(result for _, result in pool.dispatch([number, number]))


def test_a_pool_waits_for_room_and_says_so() -> None:
    hold_all(HELD_S)
    progress, started = Recorder(), time.monotonic()
    with ActorPool(ActorPoolSpec(1, 1, 0), Worker, setting="scoring", progress=progress) as pool:
        assert result_of(pool.first.work.remote(2)) == 4
    assert time.monotonic() - started > HELD_S - 2
    assert progress.reasons[0] == "1 CPU on one node; free are 0 of 2 CPU"
    assert len(progress.places) == 1
    assert progress.waited_s > STARTING_S


def test_waiting_within_a_task_comes_back_to_its_caller() -> None:
    hold_all(HELD_S)
    progress = WaitingTime(Recorder())
    assert run_in_task(pooled, 3, progress=progress) == 12
    assert progress.waited_s > STARTING_S
    quick = WaitingTime(Recorder())
    assert run_in_task(pooled, 3, progress=quick) == 12
    assert quick.waited_s == 0.0


def test_labels_and_memory_decide_where_an_actor_is_placed() -> None:
    (node,) = ray.nodes()
    here = {"ray.io/node-id": node["NodeID"]}
    with ActorPool(ActorPoolSpec(1, 0.5, 0, 60.0, 1e6, labels=here), Worker, setting="scoring") as pool:
        assert result_of(pool.first.work.remote(1)) == 2
    elsewhere = ActorPoolSpec(1, 0.5, 0, start_timeout_s=5.0, labels={"zone": "nowhere"})
    with (
        pytest.raises(WorkError, match="scoring got no place"),
        ActorPool(elsewhere, Worker, setting="scoring"),
    ):
        pass
