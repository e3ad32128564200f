"""The two kinds of failure a user can meet, raised by every room.

A `RequestError` means the request itself was wrong: nothing was started and
the command ends with exit code 2. A `WorkError` means a sound request failed
while it ran: the command ends with exit code 1 and can be resumed.
Messages name the thing, the place and the remedy.
"""

import difflib
from collections.abc import Iterable


class IterabreError(Exception):
    """Base of every error whose message is written for the user."""

    exit_code = 1


class RequestError(IterabreError):
    """The request is wrong; mend it and run the command again."""

    exit_code = 2


class WorkError(IterabreError):
    """The work failed; what was finished is kept and `--resume` continues."""

    exit_code = 1


class ChangedError(WorkError):
    """What a run was planned with was changed or exchanged meanwhile; trying again finds the same."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> RequestError:
    """Error for a name that is in no table, with the nearest names that are."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(choices[:20])}"
    return RequestError(f"unknown {kind} {name!r}; {hint}")
