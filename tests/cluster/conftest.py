"""One Ray of two CPUs for all tests of this directory."""

import os
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def ray_two_cpus() -> Iterator[None]:
    """Ray on this machine with two CPUs, of these tests alone."""
    os.environ.update(RAY_memory_monitor_refresh_ms="0", RAY_USAGE_STATS_ENABLED="0")
    # Without an address, Ray would join a cluster that something else runs on this machine.
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
