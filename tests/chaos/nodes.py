"""A Ray cluster of several raylets on this machine, and every process that belongs to it, by id."""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
START_ATTEMPTS = 4
END_TIMEOUT_S = 60

TITLES = {
    "trial": ("ray::Trajectory",),
    "score": ("ray::ScoreActor", "ray::score "),
    "train": ("ray::RayTrainWorker",),
    "evaluate": ("ray::EvalActor", "ray::evaluate "),
}
"""How Ray titles the processes of a campaign: by their class, and at work by their stage."""

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own helpers of every node, which run nothing of a campaign."""

OF_NO_JOB = ("ray::IDLE", *AGENTS, "ray::_AutoscalingCoordinatorActor")
"""Workers that wait for a job, what every node has as long as it is up, and Ray Train's detached actor."""


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that none is out of sight."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def descendants() -> list[psutil.Process]:
    """Every living process that this one has started, and those that they have."""
    return [p for p in psutil.Process().children(recursive=True) if _title(p) is not None]


def alive(role: str) -> list[int]:
    """Ids of the processes of a campaign that play `role`, a row of `TITLES`."""
    titled = ((p.pid, _title(p) or "") for p in descendants())
    return [pid for pid, title in titled if title.startswith(TITLES[role])]


def at_work() -> list[str]:
    """Titles of the Ray workers that belong to some job rather than wait for one."""
    titles = (_title(p) or "" for p in descendants())
    return [t for t in titles if t.startswith("ray::") and not t.startswith(OF_NO_JOB)]


def _title(process: psutil.Process) -> str | None:
    """Its command line; None if it is dead, be it that nobody has asked for its exit code yet."""
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline()).strip()
    except psutil.NoSuchProcess:
        return None


def environment(directory: Path) -> dict[str, str]:
    """What every process of a LocalCluster has set.

    The token is the clusters' own: Ray would else take the user's, here and there.
    """
    token = directory / "token"
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # How long the other processes look for a head that is gone: a minute if not said.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
        "ITERABRE_CACHE": str(directory / "cache"),
    }


class LocalCluster:
    """A head that takes no work and some workers of one CPU each; `address` to join it.

    `environment` must be set.
    """

    def __init__(self, workers: int = 2) -> None:
        # Sockets need short names: not under the run's own, long directory.
        self.directory = Path(tempfile.mkdtemp(prefix="chaos-"))
        port, client = _free_port(), _free_port()
        self.address = f"127.0.0.1:{port}"
        self._nodes: list[subprocess.Popen[bytes]] = []
        try:
            self._start_all(port, client, workers)
        except BaseException:
            self.stop()
            raise

    def _start_all(self, port: int, client: int, workers: int) -> None:
        self._start(
            "--head", f"--port={port}", f"--ray-client-server-port={client}", "--num-cpus=0",
            "--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={self.directory}",
        )  # fmt: skip
        for _ in range(workers):
            self.add_worker()

    def add_worker(self) -> None:
        """Start one more worker of one CPU, and wait for it."""
        self._start(f"--address={self.address}", "--num-cpus=1")

    def daemon(self, name: str) -> int:
        """Id of the head's `gcs_server`, or of the `raylet` of the last worker."""
        node = self._nodes[0 if name == "gcs_server" else -1]
        return next(p.pid for p in psutil.Process(node.pid).children(recursive=True) if p.name() == name)

    def stop(self) -> list[str]:
        """End all nodes; the command lines of what did not end with them, and had to be killed."""
        for node in reversed(self._nodes):
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGTERM)
        psutil.wait_procs(descendants(), timeout=END_TIMEOUT_S)
        left = descendants()
        lines = [_title(process) or "" for process in left]
        for process in left:
            process.kill()
        for node in self._nodes:
            node.wait()
        return lines

    def forget(self) -> None:
        """Remove the logs of a cluster that has ended."""
        shutil.rmtree(self.directory)

    def _start(self, *arguments: str) -> None:
        """Start one node and wait for it; again if it was too slow for Ray, which waits half a minute."""
        common = ("--block", "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000")
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *common, *arguments]
        for attempt in range(START_ATTEMPTS):
            output = self.directory / f"node-{len(self._nodes)}-{attempt}.txt"
            with output.open("wb") as file:
                node = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
            while node.poll() is None:
                if "Ray runtime started" in output.read_text():
                    self._nodes.append(node)
                    return
                time.sleep(0.1)
        raise AssertionError(output.read_text())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
