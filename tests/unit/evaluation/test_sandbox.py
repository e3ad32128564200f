"""Generated code is contained: each attempt is made for real, by a program in the sandbox."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from actors.errors import WorkError
from actors.evaluation.sandbox import runner as sandbox
from actors.evaluation.sandbox.runner import SANDBOX_CHILD, Limits, pass_at_1, run_program, run_tests
from actors.evaluation.sandbox.sandbox_child import PROTECTED

NOBODY = 65534
FORBIDDEN = {
    "write outside": "open({outside!r}, 'w')",
    "empty a file outside": "import os; os.open({outside!r}, os.O_RDONLY | os.O_TRUNC)",
    "remove a file outside": "import os; os.unlink({outside!r})",
    "make a file outside readable": "import os; os.chmod({outside!r}, 0o777)",
    "read a file outside": "open({outside!r}).read()",
    "read the parent's secrets": "import os; open(f'/proc/{{os.getppid()}}/environ').read()",
    "open a socket": "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "open a socket by hand": "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "fork without end": "import os\nwhile True: os.fork()",
    "start a program": "import subprocess; subprocess.run(['/bin/true'])",
    "become a program": "import os; os.execv('/bin/true', ['true'])",
    "start a thread": "import threading; threading.Thread(target=print).start()",
    "kill the parent": "import os; os.kill(os.getppid(), 9)",
    "allocate 10 GiB": "bytearray(10 << 30)",
    "write a huge file": "f = open('huge', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "raise its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "write device files": "open('/dev/full', 'w')",
}
REFUSALS = ("PermissionError", "RuntimeError: can't start new thread", "MemoryError", "OSError", "ValueError")


@pytest.mark.parametrize("attempt", FORBIDDEN)
def test_a_program_cannot(attempt: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("kept")
    outside.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = FORBIDDEN[attempt].format(outside=str(outside), port=server.getsockname()[1])
        verdict = run_program(program, Limits(wall_s=20, cpu_s=5))
    assert verdict.status == "failed"
    assert verdict.detail.startswith(REFUSALS), verdict
    assert outside.read_text() == "kept"
    assert outside.stat().st_mode & 0o777 == 0o600


def test_endless_programs_are_ended() -> None:
    assert run_program("while True: pass", Limits(cpu_s=1)).detail.endswith("(SIGKILL)")
    assert run_program("import time; time.sleep(60)", Limits(wall_s=0.5)).status == "timeout"
    many = "import itertools\nfor i in itertools.count(): open(str(i), 'wb').write(bytes(1 << 20))"
    assert run_program(many, Limits(disk_bytes=8 << 20)).status in ("failed", "killed")


def test_a_program_ends_with_whoever_started_it(tmp_path: Path) -> None:
    """A parent that is killed cannot clean up; the kernel does it."""
    (tmp_path / "program.py").write_text("import time; time.sleep(600)")
    command = [sys.executable, "-I", str(SANDBOX_CHILD), str(tmp_path), json.dumps(asdict(Limits()))]
    script = (
        f"import subprocess; p = subprocess.Popen({command}, stdin=-3, stdout=-1); p.stdout.readline(); "
        "print(p.pid, flush=True); p.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _until(lambda: not _alive(child))


def _until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_program_may_compute_and_use_its_own_directory() -> None:
    program = """
import os, tempfile, random, numpy as np
assert set(os.environ) <= {"HOME", "TMPDIR", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "LC_CTYPE"}
os.mkdir("a")
open("a/b", "w").write("text")
os.rename("a", "c")
assert open("c/b").read() == "text"
with tempfile.TemporaryFile() as file:
    file.write(b"x")
print("not seen", np.linalg.inv(np.eye(3)))
"""
    assert run_program(program).status == "passed"


@pytest.mark.parametrize(
    ("tests", "status", "detail"),
    [
        ("assert add(1, 2) == 3", "passed", ""),
        ("assert add(1, 2) == 4, 'sum'", "failed", "AssertionError: sum"),
        ("import sys; sys.exit(0)", "failed", "SystemExit: 0"),
        ("import os; os._exit(0)", "killed", "ended without an answer (exit code 0)"),
        ("import ctypes; ctypes.string_at(0)", "killed", "ended without an answer (SIGSEGV)"),
        ("def f(: pass", "failed", "SyntaxError: invalid syntax (program.py, line 3)"),
        ("import os\nfor fd in range(3, 9):\n    try: os.write(fd, b'!')\n    except OSError: pass", "killed",
         "wrote over its answer"),
    ],
)  # fmt: skip
def test_verdicts(tests: str, status: str, detail: str) -> None:
    verdict = run_tests("def add(a, b): return a + b", tests)
    assert (verdict.status, verdict.detail) == (status, detail)


def test_pass_at_1_is_the_share_that_passes() -> None:
    metric = pass_at_1(["pass", "assert False", "1 / 0", "pass"])
    assert (metric.value, metric.stderr) == (0.5, pytest.approx((0.25 / 3) ** 0.5))


def test_nothing_runs_where_a_protection_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without Landlock, imitated by asking it for a system call that it does not have."""
    script = SANDBOX_CHILD.read_text().replace("LANDLOCK_RESTRICT = 444,", "LANDLOCK_RESTRICT = 4444,")
    assert "4444" in script
    changed = tmp_path / "sandbox_child.py"
    changed.write_text(script)
    monkeypatch.setattr(sandbox, "SANDBOX_CHILD", changed)
    with pytest.raises(WorkError, match="lacks a protection: Landlock"):
        run_program(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as an ordinary user already")
@pytest.mark.parametrize("attempt", ["open a socket", "fork without end", "write outside", "allocate 10 GiB"])
def test_an_ordinary_user_is_protected_as_root_is(attempt: str) -> None:
    pythons = [p for p in (sys.executable, "/usr/bin/python3") if _runs_as_nobody(p)]
    if not pythons:
        pytest.skip("no interpreter here that an ordinary user may run")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        script = Path(directory, "sandbox_child.py")
        script.write_text(SANDBOX_CHILD.read_text())
        Path(directory, "program.py").write_text(FORBIDDEN[attempt].format(outside="/tmp/x", port=9))
        limits = json.dumps(asdict(Limits(cpu_s=5, memory_bytes=1 << 30)))
        done = subprocess.run(
            [pythons[0], "-I", "-B", str(script), directory, limits],
            input=b"token ", capture_output=True,
            user=NOBODY, group=NOBODY, extra_groups=[], env={}, timeout=60,
        )  # fmt: skip
    assert done.stdout.startswith(
        tuple(PROTECTED + b"token failed " + refusal.encode() for refusal in REFUSALS)
    )


def _runs_as_nobody(python: str) -> bool:
    try:
        command = [python, "-I", "-c", "import encodings"]
        return subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=[], timeout=60).returncode == 0
    except OSError:
        return False
