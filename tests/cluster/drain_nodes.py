"""Runs a campaign on a machine that is announced to go while it trains, as a spot machine is, and then goes.

By then another has come. A process of its own: what LocalCluster ends is all that it has started.
    python -m tests.cluster.drain_nodes CAMPAIGN RUN
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import ray

from tests.chaos.nodes import LocalCluster, adopt_orphans, alive

NOTICE_S = 20
"""Seconds between the notice and the loss."""

TIMEOUT_S = 300


def checkpoints(run: Path) -> set[int]:
    """After how many steps those were taken that lie in the run now."""
    return {int(path.name.removeprefix("step_")) for path in run.glob("train/**/step_*")}


def wait_for_training(run: Path, campaign: subprocess.Popen[bytes]) -> psutil.Process:
    """The raylet of a training worker, when there is a first checkpoint."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (checkpoints(run) and (workers := alive("train"))):
        assert campaign.poll() is None, "the campaign ended before there was a checkpoint"
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.05)
    return psutil.Process(workers[0]).parent()


def drain(address: str, raylet: psutil.Process, notice_s: int) -> None:
    """Announce to Ray that the machine of `raylet` goes."""
    sockets = {node["RayletSocketName"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    named = (argument.removeprefix("--raylet_socket_name=") for argument in raylet.cmdline())
    (node_id,) = (sockets[name] for name in named if name in sockets)
    subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={address}"),
            *("--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
            *("--reason-message", "spot", "--deadline-remaining-seconds", str(notice_s)),
        ],
        check=True,
        capture_output=True,
    )


def lose_a_machine(cluster: LocalCluster, campaign: subprocess.Popen[bytes], run: Path) -> set[int]:
    """Announce, wait, and take away; the checkpoints that were taken by then."""
    raylet = wait_for_training(run, campaign)
    drain(cluster.address, raylet, NOTICE_S)
    gone_at = time.monotonic() + NOTICE_S
    cluster.add_worker()
    seen: set[int] = set()
    while time.monotonic() < gone_at:
        seen |= checkpoints(run)
        time.sleep(0.05)
    os.kill(raylet.pid, signal.SIGKILL)
    return seen


def main() -> None:
    """Print the checkpoints that were taken before the machine was lost, and the campaign's exit code."""
    adopt_orphans()
    cluster = LocalCluster(workers=2)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        command = [sys.executable, "-m", "orchestrator.cli", "campaign", sys.argv[1]]
        campaign = subprocess.Popen([*command, "--address", cluster.address])
        print("checkpoints", *sorted(lose_a_machine(cluster, campaign, Path(sys.argv[2]))), flush=True)
        print("exit code", campaign.wait(TIMEOUT_S))
    finally:
        ray.shutdown()  # Ray ends a process whose head is gone.
        cluster.stop()
    cluster.forget()


if __name__ == "__main__":
    main()
