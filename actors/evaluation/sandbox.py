"""Running code that a model wrote, and the share of it that passes its tests (pass@1).

Each program runs in a process of its own that `confined` shuts in: no network,
no other process, no file outside an own directory, bounded CPU time, memory,
files and wall time. It guards the machine and its data against what a model may
write; it does not keep a program that means to from forging its own verdict.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from actors.contracts import Metric
from actors.errors import WorkError

CONFINED = Path(__file__).with_name("confined.py")
POLL_S = 0.01
MiB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    `disk_bytes` bounds all its files together, `file_bytes` each; `memory_bytes`
    is address space. With 10 s and 1 GiB, 159 of the 164 reference solutions of
    HumanEval+ passed and 372 of the 378 of MBPP+; the rest ran out of time, one of
    memory. The defaults are above that.
    """

    wall_s: float = 90.0
    cpu_s: int = 30
    memory_bytes: int = 4096 * MiB
    file_bytes: int = 16 * MiB
    disk_bytes: int = 64 * MiB
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    `passed`: it ended without an exception. `failed`: `detail` is the exception.
    `timeout`: its wall time was over. `killed`: it was ended by a limit of CPU time
    or disk space, or crashed.
    """

    status: Literal["passed", "failed", "timeout", "killed"]
    detail: str = ""


def check_sandbox() -> None:
    """Raise WorkError unless this machine can shut a program in."""
    run_program("")


def run_tests(code: str, tests: str, limits: Limits = Limits()) -> Outcome:
    """Run `code` and then `tests`, which raise an exception where the code is wrong.

    Raises WorkError as `run_program` does.
    """
    return run_program(f"{code}\n\n{tests}\n", limits)


def run_program(program: str, limits: Limits = Limits()) -> Outcome:
    """Run a Python program, shut in, to its end or to that of its limits.

    Raises WorkError, and runs nothing, where the kernel does not give all of the
    protection: the message names what is missing.
    """
    with tempfile.TemporaryDirectory(prefix="iterabre-", ignore_cleanup_errors=True) as directory:
        Path(directory, "program.py").write_text(program, encoding="utf-8", errors="replace")
        command = [sys.executable, "-I", "-B", str(CONFINED), directory, json.dumps(asdict(limits))]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"HOME": directory, "TMPDIR": directory, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            stopped = _wait(process, Path(directory), limits)
        finally:
            _kill(process)
        assert process.stdout is not None
        with process.stdout:
            answer = os.read(process.stdout.fileno(), 4096)
    return stopped or _outcome(answer, process.returncode)


def pass_at_1(programs: Sequence[str], limits: Limits = Limits(), workers: int | None = None) -> Metric:
    """Share of programs that pass, one for each problem, each with its tests at its end.

    pass@1 of Chen et al. (2021, "Evaluating Large Language Models Trained on Code",
    Eq. 1) with n = 1 sample a problem, and its standard error. `workers` programs run
    at a time, by default one on each CPU of this process.

    Raises WorkError as `run_program` does.
    """
    count = len(programs)
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        outcomes = list(pool.map(partial(run_program, limits=limits), programs))
    share = sum(outcome.status == "passed" for outcome in outcomes) / max(count, 1)
    stderr = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return Metric("pass_at_1", share, stderr=stderr)


def _wait(process: subprocess.Popen[bytes], directory: Path, limits: Limits) -> Outcome | None:
    """Wait for the process to end; what it must be stopped for, if anything."""
    deadline = time.monotonic() + limits.wall_s
    while process.poll() is None:
        if time.monotonic() > deadline:
            return Outcome("timeout", f"ran longer than {limits.wall_s:g} s")
        if _disk_bytes(directory) > limits.disk_bytes:
            return Outcome("killed", f"wrote more than {limits.disk_bytes} bytes")
        time.sleep(POLL_S)
    return None


def _disk_bytes(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # removed since it was listed
                continue
    return total


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and its session; a program cannot leave the session, or add to it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(answer: bytes, exit_code: int) -> Outcome:
    if not answer:
        reason = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
        return Outcome("killed", f"ended without an answer ({reason})")
    try:
        status, detail = json.loads(answer)
    except ValueError:
        return Outcome("killed", "wrote over its answer")
    if status == "unprotected":
        raise WorkError(
            f"generated code is not run on this machine, which lacks a protection: {detail}; "
            "evaluate on a machine that has it, or set allow_code_execution: false"
        )
    return Outcome(status, detail)
