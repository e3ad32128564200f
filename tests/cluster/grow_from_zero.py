"""Runs a campaign on a cluster whose workers an autoscaler starts from zero and takes away again.

Ray's fake multi-node provider starts raylets on this machine as a cloud would start machines.
A process of its own: what LocalCluster ends is all that it has started.
    python -m tests.cluster.grow_from_zero CAMPAIGN
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import ray

from tests.chaos.nodes import LocalCluster, adopt_orphans

HEAD_ID = "f" * 51 + "00000"
"""The id by which the fake provider knows the head."""

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
NOTHING_TO_SET_UP: dict[str, Any] = {
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}
SHRINK_TIMEOUT_S = 180


class AutoscaledCluster(LocalCluster):
    """A head that takes no work, and up to two workers of one CPU while something asks for them."""

    def _start_all(self, port: int, client: int, workers: int) -> None:
        file = self.directory / "autoscaling.json"
        file.write_text(json.dumps(self._autoscaling(workers)))
        os.environ.update(
            AUTOSCALER_UPDATE_INTERVAL_S="1",
            RAY_FAKE_CLUSTER="1",
            RAY_enable_autoscaler_v2="1",
            RAY_CLOUD_INSTANCE_ID=HEAD_ID,
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD_ID,
        )
        self._start(
            "--head", f"--port={port}", f"--ray-client-server-port={client}", "--num-cpus=0",
            "--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={self.directory}",
            f"--autoscaling-config={file}",
        )  # fmt: skip

    def _autoscaling(self, workers: int) -> dict[str, Any]:
        return {
            "cluster_name": "from-zero",
            "max_workers": workers,
            "idle_timeout_minutes": 0.15,
            "provider": {
                "type": "external",  # As "fake_multinode" it wants a file that Ray's wheel lacks.
                "module": PROVIDER,
                "head_node_id": HEAD_ID,
                "launch_multiple": True,
                "disable_node_updaters": True,
                "gcs_address": self.address,
            },
            **NOTHING_TO_SET_UP,
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": {
                    "resources": {"CPU": 1, "object_store_memory": 100_000_000},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": workers,
                },
            },
        }


def workers() -> int:
    """Living nodes besides the head."""
    return sum(node["Alive"] for node in ray.nodes()) - 1


def most_workers_while(busy: Callable[[], bool]) -> int:
    """The greatest number of workers at a time as long as `busy()`."""
    most = 0
    while busy():
        most = max(most, workers())
        time.sleep(0.5)
    return most


def main() -> None:
    """Print the number of workers before, at most during, and after the campaign, and its exit code."""
    adopt_orphans()
    cluster = AutoscaledCluster(workers=2)
    ray.init(address=cluster.address, log_to_driver=False)
    before = workers()
    command = [
        sys.executable,
        "-m",
        "orchestrator.cli",
        "compress",
        sys.argv[1],
        "--address",
        cluster.address,
    ]
    campaign = subprocess.Popen(command)
    most = most_workers_while(lambda: campaign.poll() is None)
    deadline = time.monotonic() + SHRINK_TIMEOUT_S
    most_workers_while(lambda: workers() > 0 and time.monotonic() < deadline)
    print(f"workers: {before} before, {most} at most, {workers()} after; exit code {campaign.returncode}")
    ray.shutdown()
    cluster.stop()
    if campaign.returncode == 0:
        cluster.forget()
    else:
        print("logs:", cluster.directory)


if __name__ == "__main__":
    main()
