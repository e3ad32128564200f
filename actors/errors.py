"""The two kinds of failure a user can meet, raised by every package.

A `RequestError` means the request itself was wrong: nothing was started and
the command ends with exit code 2. A `WorkError` means a sound request failed
while it ran: the command ends with exit code 1 and can be resumed.
Messages name the thing, the place and the remedy.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

MOST_CHARACTERS = 300


class IterabreError(Exception):
    """Base of every error whose message is written for the user."""

    exit_code = 1


class RequestError(IterabreError):
    """The request is wrong; mend it and run the command again."""

    exit_code = 2


class TooLargeError(RequestError):
    """What is to be stored is larger than it may be, or than the disk has room for."""


class WorkError(IterabreError):
    """The work failed; what was finished is kept and `--resume` continues."""

    exit_code = 1


class ChangedError(WorkError):
    """What a run was planned with was changed or exchanged meanwhile; trying again finds the same."""


class StorageUnavailableError(WorkError):
    """The storage did not answer for as long as it was tried; it may answer later."""


class DamagedArtifactError(WorkError):
    """A file of the artifact at `uri` is missing, or is not what was published."""

    def __init__(self, message: str, uri: str = "") -> None:
        super().__init__(message)
        self.uri = uri


class UnexpectedError(WorkError):
    """Something failed that no code expects. A log holds the traceback."""


class StopRequestedError(WorkError):
    """A stage ended on request, with what it had done in a checkpoint; it can go on from there."""


class MemoryExhaustedError(WorkError):
    """Memory does not suffice, with a smaller batch neither; trying again would end the same."""


FAULT = "this is a fault of iterabre or of a plug-in"


def unexpected(error: BaseException) -> UnexpectedError:
    """Return the error for an exception that no code expects, with what is to blame for it."""
    if isinstance(error, OSError | MemoryError):
        return UnexpectedError(f"{one_line(error)}: the operating system refused it")
    return UnexpectedError(f"{one_line(error)}: {FAULT}")


def one_line(error: BaseException) -> str:
    """Return the type and the message of an exception in one line, the message cut where it is long."""
    message = " ".join(str(error).split())
    if len(message) > MOST_CHARACTERS:
        message = f"{message[:MOST_CHARACTERS]} …"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def unknown_name(kind: str, name: str, known: Iterable[str]) -> RequestError:
    """Return an error for a name that is in no table, with the nearest names that are."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(choices[:20])}"
    return RequestError(f"unknown {kind} {name!r}; {hint}")


LONGEST_REASON = 400
"""Characters of a library's message that are passed on."""


def reason_of(error: BaseException) -> str:
    """Return what an exception of a library says, in one line; its type too where that alone explains it."""
    said = " ".join(str(error).split())
    said = f"{said[:LONGEST_REASON]}…" if len(said) > LONGEST_REASON else said
    return said if " " in said else f"{type(error).__name__} {said}".strip()


@contextmanager
def refusing(what: str | Callable[[], str], remedy: str) -> Iterator[None]:
    """Turn any exception of a library that reads the user's files into one `RequestError`.

    Args:
        what: what cannot be read, and where it is: the head of the message, or what finds it out.
        remedy: a sentence that says what to do.
    """
    try:
        yield
    except (IterabreError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        head = what if isinstance(what, str) else what()
        raise RequestError(f"{head}: {reason_of(error).rstrip('.')}. {remedy}") from error


def last_line(error: BaseException) -> str:
    """Return what went wrong, without the trace of the processes it went through; the logs have that."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
