"""Which Ray cluster is meant, whether anything answers there, and what Ray of this machine's own needs.

Ray itself tries an address without answer for minutes; all that can be found sooner is checked first.
"""

import json
import logging
import os
import re
import resource
import socket
from collections.abc import Mapping
from pathlib import Path

from orchestrator.config import holds_credential
from orchestrator.errors import RequestError

log = logging.getLogger(__name__)

LOCAL, AUTO = "local", "auto"
CONNECT_TIMEOUT_S = 10

JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray tells the driver of a job about it."""

OWN_PREFIX = "ITERABRE_"
"""How our own variables begin: others are Ray's or a library's, and of no harm where a job sets them."""

LEAST_OPEN_FILES = 512
"""Files that a process of Ray may have to hold open at least."""

LONGEST_SOCKET_PATH = 107
"""Bytes of a path that a Unix socket can have."""

_SOCKET = "session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.10"
"""Where Ray puts its longest-named socket below its temporary directory."""

_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\s:/@\[\]]+):(?P<port>\d{1,5})", re.ASCII)


def cluster_address(option: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Return `local`, `auto` or HOST:PORT: `--address`, else RAY_ADDRESS, else this machine alone.

    As for Ray, RAY_ADDRESS also says what `auto` is.

    Raises:
        RequestError: the address is none of these; says what kind it seems to be.
    """
    address, source = (option or "").strip(), "--address"
    variable = environment.get("RAY_ADDRESS", "").strip()
    if variable and address in ("", AUTO):
        address, source = variable, "RAY_ADDRESS"
    address = address or LOCAL
    match = _HOST_PORT.fullmatch(address)
    if address in (LOCAL, AUTO) or (match and 0 < int(match["port"]) < 65536):
        return address
    shown = "(not shown, it holds a credential)" if holds_credential(address) else repr(address)
    remedy = "give HOST:PORT of the cluster's head, e.g. 10.0.0.1:6379, auto for one that runs here, or local"
    if address.startswith("ray://"):
        kind = "is Ray Client's, over which no campaign can run"
    elif address.startswith(("http://", "https://")):
        kind = "is that of a dashboard, which only takes jobs (`ray job submit --address …`)"
    else:
        kind = "is no address of a Ray cluster"
    unset = "; or unset RAY_ADDRESS" if source == "RAY_ADDRESS" else ""
    raise RequestError(f"{source} {shown} {kind}; {remedy}{unset}")


def check_answers(address: str) -> None:
    """Check that something listens at HOST:PORT.

    Raises:
        OSError: nothing does, or no such host is known.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def unreachable(address: str, reason: str) -> RequestError:
    """Return the error of a cluster that cannot be joined; one that asks for a token is named as such."""
    if re.search(r"authenticat|auth[_ ]?token", reason, re.IGNORECASE):
        return RequestError(
            f"the Ray cluster at {address} asks for a token, and none or another was given; set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE here, where FILE holds the token that its head "
            "was started with (~/.ray/auth_token there if none was named)"
        )
    remedy = (
        "start one (ray start --head, or ray up cluster.yaml), give its address by --address or RAY_ADDRESS, "
        "or leave both out to use this machine alone"
    )
    return RequestError(f"no Ray cluster can be joined at {address}: {reason}; {remedy}")


def check_token_file(environment: Mapping[str, str] = os.environ) -> None:
    """Check that a file named as that of the cluster's token holds one; Ray aborts the process otherwise.

    Raises:
        RequestError: it cannot be read, or is empty.
    """
    file = environment.get("RAY_AUTH_TOKEN_PATH")
    if environment.get("RAY_AUTH_MODE") != "token" or not file or environment.get("RAY_AUTH_TOKEN"):
        return
    try:
        problem = "" if Path(file).read_text(encoding="utf-8").strip() else "it is empty"
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "it is no text"
    if problem:
        raise RequestError(
            f"RAY_AUTH_TOKEN_PATH {file!r} holds no token of a Ray cluster: {problem}; name the file "
            "that the cluster's head was started with"
        )


def without_variables_of_job(
    ours: Mapping[str, str], environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return our variables for workers but those that the runtime environment of this Ray job sets.

    Ray refuses a variable that both set, even to the same value; the job's value then holds.
    """
    job = json.loads(environment.get(JOB_CONFIG_VARIABLE) or "{}")
    of_job: Mapping[str, str] = (job.get("runtime_env") or {}).get("env_vars") or {}
    for name in sorted(ours.keys() & of_job.keys()):
        if name.startswith(OWN_PREFIX) and of_job[name] != ours[name]:
            log.warning(
                "the job's runtime_env sets %s to %r, but workers need %r; leave it out there",
                name, of_job[name], ours[name],
            )  # fmt: skip
    return {name: value for name, value in ours.items() if name not in of_job}


def ray_temp_dir(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return where Ray of this machine's own keeps its sockets and logs; None leaves it to Ray.

    That is below RAY_TMPDIR or TMPDIR, as Ray has it, unless that path is too long for sockets or has
    spaces.

    Raises:
        RequestError: that directory is not there or cannot be written.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if environment.get(name)), None)
    if variable is None:
        return None if not {"RAY_TMPDIR", "TMPDIR"} & environment.keys() else "/tmp/ray"
    directory = os.path.abspath(environment[variable])
    if not os.path.isdir(directory) or not os.access(directory, os.W_OK | os.X_OK):
        raise RequestError(
            f"{variable} {environment[variable]!r} is no directory that can be written, and Ray keeps its "
            f"sockets and logs there; make it, or set {variable} to another"
        )
    chosen = os.path.join(directory, "ray")
    fits = len(os.fsencode(os.path.join(chosen, _SOCKET))) <= LONGEST_SOCKET_PATH
    # Ray writes it into command lines, which it splits at spaces.
    if fits and not re.search(r"\s", chosen):
        return chosen
    short = Path(f"/tmp/ray-{os.getuid()}")
    try:
        short.mkdir(mode=0o700, exist_ok=True)
        usable = short.stat().st_uid == os.getuid() and os.access(short, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if not usable:
        raise RequestError(
            f"{variable} {environment[variable]!r} is too long a path for Ray's sockets "
            f"({LONGEST_SOCKET_PATH} bytes) or has spaces, and {short} cannot be used; set RAY_TMPDIR to "
            "a short one"
        )
    return str(short)


def check_open_files() -> None:
    """Check that processes may open as many files as Ray needs; it raises the soft limit by itself.

    Raises:
        RequestError: the hard limit is lower.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < LEAST_OPEN_FILES:
        raise RequestError(
            f"the limit of open files (ulimit -n) is {hard}, and Ray needs {LEAST_OPEN_FILES} or more: raise "
            "it (ulimit -Hn 8192, or the limits of the batch system), or set execution.backend: local"
        )
