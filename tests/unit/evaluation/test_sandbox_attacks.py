"""Whatever a program does is its verdict, and the next program is judged as if it had not been there."""

# ruff: noqa: E501 (a row of the tables is a program)
import os
import tempfile
from pathlib import Path

import pytest

from actors.evaluation.sandbox import runner as sandbox
from actors.evaluation.sandbox.runner import SANDBOX_CHILD, Limits, check_sandbox, run_program
from actors.evaluation.sandbox.scratch import remove_tree, scratch_directory

NOBODY = 65534
LIMITS = Limits(wall_s=3, cpu_s=1, memory_bytes=1 << 30, file_bytes=4 << 20, disk_bytes=16 << 20)

TELL = """
import os
def tell(data):
    for descriptor in range(3, 32):
        try:
            os.write(descriptor, data)
        except OSError:
            pass
"""
DEEPER = "import os\nfor i in range({}):\n    os.mkdir({!r})\n    os.chdir({!r})\n"
NOT_THE_ANSWER = "wrote over its answer"
NO_ANSWER = "ended without an answer"
ENDLESS = ("SIGKILL", "ran longer than")
"""The processor's time or the clock's: which ends first depends on what else the machine does."""


CHANNEL = {
    "says that a protection is missing": (TELL + "tell(b'[\"unprotected\", \"x\"]'); os._exit(0)", NOT_THE_ANSWER),
    "says so and goes on": (TELL + "tell(b'unprotected\\n')", NOT_THE_ANSWER),
    "says that it passed": (TELL + "tell(b'passed'); os._exit(0)", NOT_THE_ANSWER),
    "says that it passed, as JSON": (TELL + "tell(b'[\"passed\", \"\"]'); os._exit(0)", NOT_THE_ANSWER),
    "repeats the whole answer": (TELL + "tell(b'protected\\npassed'); os._exit(0)", NOT_THE_ANSWER),
    "answers null": (TELL + "tell(b'null'); os._exit(0)", NOT_THE_ANSWER),
    "answers NaN": (TELL + "tell(b'NaN'); os._exit(0)", NOT_THE_ANSWER),
    "answers brackets": (TELL + "tell(b'[' * 60_000); os._exit(0)", NOT_THE_ANSWER),
    "answers no UTF-8": (TELL + "tell(b'\\xff\\xfe\\x00'); os._exit(0)", NOT_THE_ANSWER),
    "answers a line": (TELL + "tell(b'\\n'); os._exit(0)", NOT_THE_ANSWER),
    "answers a million bytes": (TELL + "tell(bytes(1 << 20)); os._exit(0)", NOT_THE_ANSWER),
    "answers without end": (TELL + "while True: tell(b'x' * 999)", *ENDLESS),
    "closes the channel": ("import os; os.closerange(0, 99)", NO_ANSWER),
    "puts a file in its place": (
        "import os\nf = os.open('f', os.O_CREAT | os.O_RDWR)\nfor i in range(3, 32):\n    i != f and os.dup2(f, i)",
        NO_ANSWER,
        "OSError",
    ),
}  # fmt: skip
ENDINGS = {
    "leaves before its tests": ("import os; os._exit(0)", NO_ANSWER),
    "leaves with a code": ("import os; os._exit(77)", "exit code 77"),
    "leaves politely": ("raise SystemExit(0)", "SystemExit: 0"),
    "is interrupted": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "segfaults": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "overflows the stack": (
        "import sys; sys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self): return repr([self])\nrepr(A())",
        "SIGSEGV",
        "MemoryError",
        "RecursionError",
    ),
    "recurses": ("def f(): f()\nf()", "RecursionError"),
    "sleeps": ("import time\nwhile True: time.sleep(9)", "ran longer than 3 s"),
    "ignores signals": (
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ntime.sleep(60)",
        "ran longer than 3 s",
    ),
    "computes without end": ("while True: pass", *ENDLESS),
    "prints without end": ("import sys\nwhile True: print('x' * 9999, file=sys.stderr)", *ENDLESS),
    "takes all memory": ("x = [0]\nwhile True: x += x", "MemoryError"),
    "takes it and holds on": ("x = [0]\nwhile True:\n    try: x += x\n    except MemoryError: pass", *ENDLESS),
    "raises the limits": ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "ValueError", "Error"),
    "forks": ("import os\nwhile True: os.fork()", "PermissionError"),
    "daemonises": ("import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass", "PermissionError"),
    "runs a pool": ("import multiprocessing as m; m.Process(target=print).start()", "Error"),
    "kills its group": ("import os; os.killpg(0, 9)", "PermissionError"),
    "kills everything": ("import os; os.kill(-1, 9)", "PermissionError"),
    "leaves its session": ("import os; os.setsid()", "PermissionError"),
    "unmounts": (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"
        "if c.umount2(os.getcwd().encode(), 2) or c.unshare(0x10000000): raise OSError(ctypes.get_errno(), 'no')",
        "PermissionError: [Errno 1] no",
    ),
}  # fmt: skip
INTERPRETER = {
    "replaces modules": (
        "import json, os, sys\njson.dumps = lambda x: '[\"passed\", \"\"]'\n"
        "os.write = os._exit = sys.exit = lambda *_: 0\nraise ValueError('wrong')",
        "ValueError: wrong",
    ),
    "replaces what runs it": (
        "import __main__\nfor name in list(vars(__main__)): setattr(__main__, name, lambda *_: b'passed')\nassert False",
        "AssertionError",
        NO_ANSWER,
    ),
    "replaces built-in names": (
        "import builtins\nbuiltins.BaseException = ValueError\nbuiltins.str = builtins.type = print\nraise KeyError",
        NO_ANSWER,
    ),
    "deletes built-in names": ("import builtins\nvars(builtins).clear()\nx", NO_ANSWER, "NameError"),
    "raises what cannot be reported": (
        "class E(Exception):\n    def __str__(self): raise KeyboardInterrupt\nraise E", "failed E"
    ),
    "raises what leaves": ("import os\nclass E(Exception):\n    def __str__(self): os._exit(0)\nraise E", NO_ANSWER),
    "raises what never ends": (
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E", *ENDLESS
    ),
    "raises a long story": ("raise ValueError('\\U0001f600\\ud800\\n\\0' * 10**6)", "ValueError: \\U0001f600\\ud800"),
    "raises under an odd name": ("raise type('\\ud800 passed', (Exception,), {})('passed')", "UnicodeEncodeError", "\\ud800 passed"),
    "audits": (
        "import sys\ndef hook(*_): raise ValueError\nsys.addaudithook(hook)\nopen('x')", "ValueError", NO_ANSWER
    ),
    "traces": ("import sys\nsys.settrace(lambda *_: 1 / 0)\ndef f(): pass\nf()", "ZeroDivisionError"),
    "is no text": ("\ud800", "SyntaxError"),
    "has a null byte": ("x = '\0'", "Error"),
    "is in an unknown encoding": ("# coding: klingon\n", "SyntaxError"),
    "is nested deeply": ("x = " + "(" * 99_999, "Error", "SIGSEGV"),
    "is long and wrong": ("x = 1\n" * 20_000 + "assert False", "AssertionError"),
}  # fmt: skip
FULL = ("No space left", "wrote more than", "made more than", "cannot be read")
FILES = {
    "nests directories": (DEEPER.format(3000, "d", "d") + "assert False", "AssertionError", *FULL),
    "makes paths too long to name": (DEEPER.format(40, "d" * 250, "d" * 250) + "assert False", "AssertionError", *FULL),
    "keeps removed files open": (
        "import os, time\nkept = []\nfor i in range(24):\n    kept.append(open('f', 'wb', buffering=0))\n"
        "    os.unlink('f')\n    kept[-1].write(bytes(4 << 20))\ntime.sleep(60)",
        *FULL,
    ),
    "keeps removed files mapped": (
        "import ctypes, os, time\nfor i in range(40):\n    f = open('f', 'w+b', buffering=0)\n"
        "    f.write(bytes(4 << 20))\n    ctypes.CDLL(None).mmap(None, 4096, 1, 2, f.fileno(), 0)\n"
        "    f.close()\n    os.unlink('f')\ntime.sleep(60)",
        *FULL,
    ),
    "fills the disk": ("for i in range(10**6): open(str(i), 'wb').write(bytes(4 << 20))", *FULL),
    "fills it and holds on": (
        "import itertools\nfor i in itertools.count():\n    try: open(str(i), 'wb').write(bytes(1 << 20))\n"
        "    except OSError: pass",
        *ENDLESS, *FULL,
    ),
    "writes a huge file": ("open('f', 'wb').write(bytes(64 << 20))", "OSError: [Errno 27] File too large"),
    "makes a sparse file": ("open('f', 'wb').truncate(1 << 40)", "OSError: [Errno 27] File too large"),
    "makes empty files": ("import itertools\nfor i in itertools.count(): open(str(i), 'w').close()", *FULL),
    "makes directories": ("import itertools, os\nfor i in itertools.count(): os.mkdir(str(i))", *FULL),
    "makes an unreadable directory": (
        "import os\nos.makedirs('a/b'); open('a/b/c', 'w').close(); os.mkdir('d', 0); os.mkdir('a/e', 0)\nassert False",
        "AssertionError", *FULL,
    ),
    "makes an unreadable file": ("import os; os.close(os.open('f', os.O_CREAT, 0)); assert False", "AssertionError"),
    "names files in no encoding": (
        "import os\nfor n in (b'\\xff\\xfe', b'\\n', b'x' * 255): os.mkdir(n + b'', 0o700); open(n + b'/f', 'w')\n1 / 0",
        "ZeroDivisionError",
    ),
    "makes a FIFO": ("import os; os.mkfifo('f'); open('f')", "PermissionError"),
    "makes a symlink loop": ("import os; os.symlink('.', 'loop')", "PermissionError"),
    "makes a hard link": ("import os; os.link('program.py', 'f')", "PermissionError"),
    "changes modes": ("import os; os.chmod('program.py', 0)", "PermissionError"),
    "removes itself": ("import os; os.unlink('program.py'); os.rmdir(os.getcwd()); 1 / 0", "Error"),
}  # fmt: skip
ATTACKS = CHANNEL | ENDINGS | INTERPRETER | FILES


MOUNTED, WATCHED = "a file system of its own", "no mounts for users"


@pytest.fixture
def temporary(disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sandbox makes its directories, with and without a kernel that lets users mount."""
    if disk == WATCHED:
        script = SANDBOX_CHILD.read_text().replace(
            "CLONE_NEWUSER, CLONE_NEWNS = 0x1", "CLONE_NEWUSER, CLONE_NEWNS = 0x9"
        )
        assert "0x9" in script
        (tmp_path / "sandbox_child.py").write_text(script)
        monkeypatch.setattr(sandbox, "SANDBOX_CHILD", tmp_path / "sandbox_child.py")
    (directory := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


@pytest.mark.parametrize(
    ("attack", "disk"), [*((attack, MOUNTED) for attack in ATTACKS), *((attack, WATCHED) for attack in FILES)]
)
def test_a_program_that(attack: str, temporary: Path) -> None:
    program, *verdicts = ATTACKS[attack]
    judged = run_program(program, LIMITS)
    verdict = f"{judged.status} {judged.detail}"
    assert judged.status != "passed"
    assert any(expected in verdict for expected in verdicts), verdict
    assert not list(temporary.iterdir())
    assert _children() == []
    assert run_program("assert 1 + 1 == 2").status == "passed"


def _children() -> list[str]:
    """Processes in which a program runs, whoever is their parent by now."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"sandbox_child.py" in command and str(tempfile.gettempdir()).encode() in command:
            found.append(process.name)
    return found


def test_a_removed_directory_may_be_deep_and_closed_to_its_owner(tmp_path: Path) -> None:
    """Made and removed by an ordinary user, as no mode keeps root out."""
    os.chmod(tmp_path, 0o777)
    for parent in list(tmp_path.parents)[:3]:
        os.chmod(parent, parent.stat().st_mode | 0o011)
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            top = str(tmp_path / "top")
            os.mkdir(top)
            os.chdir(top)
            for closed in ("x", "y"):
                os.mkdir(closed)
                os.mkdir(f"{closed}/z")
                os.chmod(f"{closed}/z", 0)
                os.chmod(closed, 0)
            for _ in range(1200):
                os.mkdir("deep")
                os.chdir("deep")
            open("f", "w").close()
            os.chdir("/")
            remove_tree(top)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert not (tmp_path / "top").exists()


def test_a_directory_that_cannot_be_removed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_directory() as directory:
        os.rename(directory, tmp_path / "elsewhere")
    assert f"{directory} is left behind" in caplog.text


@pytest.mark.parametrize("disk", [MOUNTED, WATCHED])
def test_the_limits_let_an_ordinary_program_use_files(temporary: Path) -> None:
    program = """
import inspect, mmap, os, tempfile
def f(): pass
assert inspect.getsource(f) == 'def f(): pass\\n'
with tempfile.TemporaryDirectory() as directory, open(directory + '/x', 'w+b') as file:
    file.write(bytes(4096))
    file.flush()
    with mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:2] = b'ok'
    file.seek(0)
    assert file.read(2) == b'ok'
"""
    assert run_program(program) == sandbox.Verdict("passed")
    check_sandbox()
