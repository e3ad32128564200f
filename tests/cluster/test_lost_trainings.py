"""What a training that lost its controller leaves on the cluster."""

import os
import time

import pytest
import ray
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from orchestrator.execution.cluster import free_places_of_dead_trainings

CPU = [{"CPU": 0.5}]


@ray.remote(num_cpus=0)
class Controller:
    """Makes a place, as that of Ray Train does."""

    def place(self) -> PlacementGroup:
        group = placement_group(CPU)
        ray.get(group.ready())
        return group

    def die(self) -> None:
        os._exit(1)


def test_the_place_of_a_dead_controller_is_freed_and_no_other(ray_two_cpus: None) -> None:
    lost, alive = Controller.remote(), Controller.remote()
    left = ray.get(lost.place.remote())
    kept = [ray.get(alive.place.remote()), placement_group([{"CPU": 0.0001}])]
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(lost.die.remote())
    deadline, wanted = time.monotonic() + 60, ["REMOVED", "CREATED", "CREATED"]
    states: list[str] = []
    # Ray takes a moment to note the death.
    while states != wanted and time.monotonic() < deadline:
        free_places_of_dead_trainings()
        time.sleep(0.2)
        states = [placement_group_table(group)["state"] for group in (left, *kept)]
    assert states == wanted
    for group in kept:
        remove_placement_group(group)
    ray.kill(alive)
