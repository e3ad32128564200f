"""Running code that a model wrote, and the share of it that passes its tests (pass@1).

Each program runs in a process of its own that `sandbox_child` confines: no network,
no other process, no file outside an own directory, bounded CPU time, memory,
files, disk space and wall time. Whatever it does is its verdict; the sandbox guards the
machine, its data and the evaluation against what a model may write. A verdict
needs a token that the program does not get; one that searches its own process for
it, or answers every comparison with yes, can still forge a pass.
"""

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from actors.contracts import Metric
from actors.errors import WorkError
from actors.evaluation.sandbox.sandbox_child import PROTECTED
from actors.evaluation.sandbox.scratch import scratch_directory, usage

SANDBOX_CHILD = Path(__file__).with_name("sandbox_child.py")
POLL_S = 0.01
MAX_VERDICT_BYTES = 8192
MiB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    `disk_bytes` bounds all its files together, `file_bytes` each, `files` their
    number with that of directories; `memory_bytes` is address space. With 10 s and
    1 GiB, 159 of the 164 reference solutions of HumanEval+ passed and 372 of the 378
    of MBPP+; the rest ran out of time, one of memory. The defaults are above that.
    """

    wall_s: float = 90.0
    cpu_s: int = 30
    memory_bytes: int = 4096 * MiB
    file_bytes: int = 16 * MiB
    disk_bytes: int = 64 * MiB
    files: int = 1000
    open_files: int = 32


@dataclass(frozen=True)
class Verdict:
    """How a program ended.

    `passed`: it ended without an exception. `failed`: `detail` is the exception,
    which may come from a limit: MemoryError, or OSError where its disk is full.
    `timeout`: its wall time was over. `killed`: it was ended by a limit, crashed, or
    left without a verdict.
    """

    status: Literal["passed", "failed", "timeout", "killed"]
    detail: str = ""


def check_sandbox() -> None:
    """Raise WorkError unless this machine can confine a program, and run it."""
    verdict = run_program("")
    if verdict.status != "passed":
        raise WorkError(f"an empty program does not end in the sandbox of this machine: {verdict.detail}")


def run_tests(code: str, tests: str, limits: Limits = Limits()) -> Verdict:
    """Run `code` and then `tests`, which raise an exception where the code is wrong.

    Raises WorkError as `run_program` does.
    """
    return run_program(f"{code}\n\n{tests}\n", limits)


def run_program(program: str, limits: Limits = Limits()) -> Verdict:
    """Run a Python program, confined, to its end or to that of its limits.

    Raises WorkError, and runs nothing, where the kernel does not give all of the
    protection: the message names what is missing.
    """
    token = secrets.token_hex().encode()
    with scratch_directory() as directory:
        Path(directory, "program.py").write_text(program, encoding="utf-8", errors="replace")
        command = [sys.executable, "-I", "-B", str(SANDBOX_CHILD), directory, json.dumps(asdict(limits))]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"HOME": directory, "TMPDIR": directory, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError), process.stdin:  # broken: it has ended; see `_read_verdict`
                process.stdin.write(token)
            stopped = _wait(process, directory, limits)
        finally:
            # A program cannot leave the session, or add to it.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with process.stdout:
            output = os.read(process.stdout.fileno(), MAX_VERDICT_BYTES)
    return stopped or _read_verdict(output, token, process.returncode)


def pass_at_1(programs: Sequence[str], limits: Limits = Limits(), workers: int | None = None) -> Metric:
    """Return the share of programs that pass, one for each problem, each with its tests at its end.

    pass@1 of Chen et al. (2021, "Evaluating Large Language Models Trained on Code",
    Eq. 1) with n = 1 sample a problem, and its standard error. `workers` programs run
    at a time, by default one on each CPU of this process.

    Raises WorkError as `run_program` does.
    """
    count = len(programs)
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        verdicts = list(pool.map(partial(run_program, limits=limits), programs))
    share = sum(verdict.status == "passed" for verdict in verdicts) / max(count, 1)
    stderr = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return Metric("pass_at_1", share, stderr=stderr)


def _wait(process: subprocess.Popen[bytes], directory: str, limits: Limits) -> Verdict | None:
    """Wait for the process to end; return the verdict if it must be stopped."""
    deadline = time.monotonic() + limits.wall_s
    while process.poll() is None:
        if time.monotonic() > deadline:
            return Verdict("timeout", f"ran longer than {limits.wall_s:g} s")
        try:
            used, files = usage(directory, process.pid, limits.files, limits.file_bytes)
        except OSError as error:
            return Verdict("killed", f"made a directory that cannot be read ({error.strerror})")
        if used > limits.disk_bytes:
            return Verdict("killed", f"wrote more than {limits.disk_bytes} bytes")
        if files > limits.files:
            return Verdict("killed", f"made more than {limits.files} files")
        time.sleep(POLL_S)
    return None


def _read_verdict(output: bytes, token: bytes, exit_code: int) -> Verdict:
    """Read the verdict of `sandbox_child`; all that follows its first line may be the program's."""
    code = -exit_code
    reason = signal.Signals(code).name if code in set(signal.Signals) else f"exit code {exit_code}"
    if not output.startswith(PROTECTED):
        missing = output.decode(errors="replace") or f"its process ended before the program began ({reason})"
        raise WorkError(
            f"generated code is not run on this machine, which lacks a protection: {missing}; "
            "evaluate on a machine that has it, or set allow_code_execution: false"
        )
    verdict = output.removeprefix(PROTECTED)
    if not verdict or exit_code:
        return Verdict("killed", f"ended without an answer ({reason})")
    status, _, detail = verdict.removeprefix(token).partition(b" ")
    if verdict == token + b"passed":
        return Verdict("passed")
    if verdict.startswith(token) and status == b"failed":
        return Verdict("failed", detail.decode(errors="replace"))
    return Verdict("killed", "wrote over its answer")
