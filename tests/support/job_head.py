"""A Ray head of this machine that takes jobs, and the token without which it takes none."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HEAD_START_S = 120


@contextmanager
def token() -> Iterator[None]:
    """Whoever would use the cluster has to know a token, which is this process's and its children's alone."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "token"
        file.write_text(secrets.token_hex(32))
        file.chmod(0o600)
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
        yield


@contextmanager
def head(cpus: int) -> Iterator[str]:
    """A Ray head of this process alone; the address for jobs.

    It runs in an empty directory: a job without one of its own finds only what is installed.
    """
    port, dashboard = free_port(), free_port()
    command = [*("-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=true")]
    command += [f"--num-cpus={cpus}", f"--port={port}", f"--dashboard-port={dashboard}"]
    environment = {**os.environ, "RAY_memory_monitor_refresh_ms": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory() as empty:
        ray = subprocess.Popen(
            [sys.executable, *command],
            cwd=empty,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{dashboard}"
            wait_until_answers(f"{address}/api/version")
            yield address
        finally:
            os.killpg(ray.pid, signal.SIGTERM)
            ray.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_answers(url: str) -> None:
    deadline = time.monotonic() + HEAD_START_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it asks for the token
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
