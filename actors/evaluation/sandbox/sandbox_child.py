"""Runs one program that a model wrote, confined by the Linux kernel; `runner` starts it.

    python -I sandbox_child.py DIRECTORY LIMITS_JSON

A script of its own, standard library only: it is executed by path, in a fresh
interpreter with an empty environment. Before the program begins, the process
gives up for good, in this order: resources (rlimits), capabilities, the file
system except for reading the interpreter's own files and for its directory
(Landlock), and every system call that is not in `ALLOWED` (seccomp). There is no
call among them that makes a process, a thread or a socket, signals another
process, or changes the mode or owner of a file: a program is one thread that can
compute, and read and write below DIRECTORY. If any of this cannot be had, the
program is not run. Where users may mount, DIRECTORY is a file system of its own
that holds no more than the limits say and ends with the process; elsewhere
the limits of disk space are left to the parent.

The first line of the standard output is `PROTECTED`, or what protection is
missing. The verdict follows: the token that was read from the
standard input, "passed" or "failed", and the exception. A program that writes to
the same channel does not have the token, and comes too late for the first line.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of `ALLOWED` and the kernel's number (AUDIT_ARCH) of each processor that is known here."""

OPENAT, IOCTL, FCNTL = (257, 56), (16, 29), (72, 25)
FIOCLEX, F_GETFL, F_DUPFD_CLOEXEC = 0x5451, 3, 1030
ALLOWED = (
    # read, write, close, lseek, fstat, newfstatat, statx, stat, lstat
    (0, 63), (1, 64), (3, 57), (8, 62), (5, 80), (262, 79), (332, 291), (4, None), (6, None),
    # access, faccessat, faccessat2, readlink, readlinkat, getdents64, getcwd, chdir
    (21, None), (269, 48), (439, 439), (89, None), (267, 78), (217, 61), (79, 17), (80, 49),
    # pread64, pwrite64, readv, writev, dup, dup2, dup3, pipe2, ftruncate, fsync
    (17, 67), (18, 68), (19, 65), (20, 66), (32, 23), (33, None), (292, 24), (293, 59), (77, 46), (74, 82),
    # mkdir, mkdirat, rmdir, unlink, unlinkat, rename, renameat, renameat2
    (83, None), (258, 34), (84, None), (87, None), (263, 35), (82, None), (264, 38), (316, 276),
    # mmap, munmap, mremap, mprotect, madvise, brk
    (9, 222), (11, 215), (25, 216), (10, 226), (28, 233), (12, 214),
    # rt_sigaction, rt_sigprocmask, rt_sigreturn, sigaltstack, restart_syscall
    (13, 134), (14, 135), (15, 139), (131, 132), (219, 128),
    # futex, sched_yield, sched_getaffinity, getrandom, membarrier
    (202, 98), (24, 124), (204, 123), (318, 278), (324, 283),
    # clock_gettime, clock_getres, clock_nanosleep, nanosleep, gettimeofday, times, getrusage, select, poll
    (228, 113), (229, 114), (230, 115), (35, 101), (96, 169), (100, 153), (98, 165), (23, None), (7, None),
    # pselect6, ppoll, uname, sysinfo, getpid, gettid, getppid, getuid, geteuid, getgid, getegid
    (270, 72), (271, 73), (63, 160), (99, 179), (39, 172), (186, 178), (110, 173),
    (102, 174), (107, 175), (104, 176), (108, 177),
    # exit, exit_group
    (60, 93), (231, 94),
)  # fmt: skip
"""Numbers of the system calls that a program may make, on x86-64 and on AArch64 (None: it has no such call).

`openat` is let through by its flags, `ioctl` for nothing but closing a file on exec, `fcntl` for
duplicates, for closing on exec and for reading flags: its others can send signals.
"""

READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom")
"""Beside the interpreter's own prefixes: what importing a module may need to read."""

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_DIR, MAKE_REG = 1 << 7, 1 << 8
READ = EXECUTE | READ_FILE | READ_DIR
WRITE = WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG
HANDLED = (1 << 13) - 1
"""Landlock rights, all those of its first version: what is handled and not granted is forbidden."""

CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x20000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 18
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
EPERM, ALLOW, KILL = 0x00050001, 0x7FFF0000, 0x80000000

libc = ctypes.CDLL(None, use_errno=True)


PROTECTED = b"protected\n"


class UnprotectedError(Exception):
    """The kernel does not give a protection; the message names it."""


def main(directory: str, limits: dict[str, int]) -> None:
    """Confine this process and run `program.py` of `directory`.

    What is used after the program is bound before it: it may replace any module's
    functions. Of its own it can raise, and then it has not passed.
    """
    channel, token = os.dup(1), sys.stdin.buffer.read()
    write, end, described = os.write, os._exit, describe
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.set_blocking(channel, False)  # a program that fills the channel continues, and fails
    program = Path(directory, "program.py").read_bytes()
    try:
        confine(directory, limits)
    except UnprotectedError as error:
        write(channel, str(error).encode())
        end(0)
    write(channel, PROTECTED)
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
        verdict = b"passed"
    except BaseException as error:  # whatever it raised, SystemExit too, is its verdict
        verdict = b"failed " + described(error)
    write(channel, token + verdict)
    end(0)


def describe(error: BaseException) -> bytes:
    """Return type and message of an exception, whose class may be the program's own."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = type(error).__name__
    return text[:300].encode("ascii", "backslashreplace")


def confine(directory: str, limits: dict[str, int]) -> None:
    """Give up everything that a program does not need.

    Raises:
        UnprotectedError: something of it cannot be given up on this machine.
    """
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise UnprotectedError(
            f"Linux on {' or '.join(MACHINES)} (this is {sys.platform}, {platform.machine()})"
        )
    with contextlib.suppress(OSError):  # where memory runs out, this process goes, not the evaluation
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError):
        _bound_disk(directory, limits)
    os.chdir(directory)
    _checked("prctl(PR_SET_PDEATHSIG)", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    for kind, limit in (
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (bound, bound))
    # Root without capabilities is a user like any other.
    _checked("capset", libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))
    _checked("prctl(PR_SET_NO_NEW_PRIVS)", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _close_file_system(directory)
    _close_kernel()


def _bound_disk(directory: str, limits: dict[str, int]) -> None:
    """Mount a file system of bounded size on the directory, seen by this process alone.

    Raises:
        OSError: users may not mount here; nothing depends on it.
    """
    program = Path(directory, "program.py").read_bytes()
    identity = {"setgroups": "deny"} | {
        f"{kind}_map": f"{number} {number} 1"
        for kind, number in (("uid", os.geteuid()), ("gid", os.getegid()))
    }
    _called(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    for file, text in identity.items():
        Path("/proc/self", file).write_text(text)
    _called(libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None))
    flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV | MS_NOEXEC)
    options = f"size={limits['disk_bytes']},nr_inodes={limits['files']},mode=700".encode()
    _called(libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", flags, options))
    Path(directory, "program.py").write_bytes(program)


def _called(status: int) -> None:
    if status < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _close_file_system(directory: str) -> None:
    ruleset = libc.syscall(LANDLOCK_CREATE, struct.pack("Q", HANDLED), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        raise UnprotectedError("Landlock (Linux 5.13, with landlock among the enabled security modules)")
    for path in {*READABLE, sys.prefix, sys.base_prefix, sys.exec_prefix}:
        if os.path.exists(path):
            _grant(ruleset, path, READ if os.path.isdir(path) else READ_FILE)
    _grant(ruleset, directory, READ | WRITE)
    _checked("landlock_restrict_self", libc.syscall(LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)


def _grant(ruleset: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, place)
    _checked(f"landlock_add_rule for {path}", libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0))
    os.close(place)


def _close_kernel() -> None:
    """Let only `ALLOWED` pass; other calls fail with EPERM, those of a foreign instruction set kill."""
    column, architecture = MACHINES[platform.machine()]
    numbers = [row[column] for row in ALLOWED if row[column] is not None]
    load, equal, greater, mask, give = 0x20, 0x15, 0x25, 0x54, 0x06  # BPF: ld [k], jeq k, jgt k, and k, ret k
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, architecture),
        (give, 0, 0, KILL),
        (load, 0, 0, 0),  # the number of the call
        *[step for number in numbers for step in ((equal, 0, 1, number), (give, 0, 0, ALLOW))],
        (equal, 0, 5, FCNTL[column]),
        (load, 0, 0, 24),  # its second argument, the command
        (equal, 1, 0, F_DUPFD_CLOEXEC),
        (greater, 1, 0, F_GETFL),
        (give, 0, 0, ALLOW),
        (give, 0, 0, EPERM),
        (equal, 0, 3, IOCTL[column]),
        (load, 0, 0, 24),  # its second argument, the request
        (equal, 0, 6, FIOCLEX),
        (give, 0, 0, ALLOW),
        (equal, 0, 4, OPENAT[column]),
        (load, 0, 0, 32),  # its third argument, the flags
        (mask, 0, 0, os.O_TRUNC | os.O_ACCMODE),
        (equal, 1, 0, os.O_TRUNC | os.O_RDONLY),  # Landlock's first versions let this empty any file
        (give, 0, 0, ALLOW),
        (give, 0, 0, EPERM),
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    description = struct.pack("HP", len(program), ctypes.addressof(buffer))
    _checked("seccomp", libc.prctl(PR_SET_SECCOMP, 2, description, 0, 0))


def _checked(what: str, status: int) -> None:
    if status < 0:
        raise UnprotectedError(f"{what} ({os.strerror(ctypes.get_errno())})")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
