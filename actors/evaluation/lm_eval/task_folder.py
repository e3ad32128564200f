"""The folder of the user's own lm-eval tasks, known by its content."""

import hashlib
import socket
from pathlib import Path

from actors.contracts import EvaluationSpec, digest
from actors.errors import ChangedError


def tasks_fingerprint(include_path: str | None) -> str | None:
    """Return the hash of the names and contents of all files in a folder of tasks; None for no folder."""
    if include_path is None:
        return None
    root = Path(include_path)
    hashes = []
    for file in sorted(file for file in root.rglob("*") if file.is_file()):
        name = file.relative_to(root).as_posix()
        if "__pycache__/" not in name:  # what importing a task's functions leaves changes no task
            hashes.append([name, hashlib.sha256(file.read_bytes()).hexdigest()])
    return digest(hashes)


def check_tasks_unchanged(spec: EvaluationSpec) -> None:
    """Refuse, once its tasks are loaded, a folder that is not the one that `spec` was planned with.

    Raises:
        ChangedError: it was changed, or is another on this machine.
    """
    found = tasks_fingerprint(spec.include_path)
    if spec.tasks and spec.tasks_fingerprint not in (None, found):
        raise ChangedError(
            f"the folder of lm-eval tasks {spec.include_path!r} is not the one that the run was planned "
            f"with: it was changed since, or differs on {socket.gethostname()} (fingerprint "
            f"{str(found)[:12]}, planned with {str(spec.tasks_fingerprint)[:12]}). Put the former files back "
            "and continue with --resume, or start a new run for these"
        )
