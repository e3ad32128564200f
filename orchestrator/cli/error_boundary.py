"""The outermost error boundary: what no code expects ends in one line, and its traceback in a file."""

import os
import select
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from typer import Abort, Exit
from typer.core import TyperGroup
from typer.exceptions import TyperException

from actors.errors import IterabreError, UnexpectedError, WorkError, unexpected

MEANT = (IterabreError, TyperException, Exit, Abort)
"""What a command raises on purpose."""


@contextmanager
def error_boundary(logs: Callable[[], Path | None] = lambda: None) -> Iterator[None]:
    """Turn whatever the body raises by mistake into an error for the user.

    Args:
        logs: directory for the traceback; a new temporary file holds it if None.

    Raises:
        UnexpectedError: names the error, what is to blame for it, and the file with the traceback.
        WorkError: the user stopped the body.
    """
    try:
        yield
    except (*MEANT, SystemExit, GeneratorExit):
        raise
    except KeyboardInterrupt as interrupt:
        raise WorkError("stopped") from interrupt
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            raise
        file = _written(error, logs)
        raise UnexpectedError(f"{unexpected(error)}; the traceback is in {file}, --debug shows it") from error


class BoundedGroup(TyperGroup):
    """The commands of a program, each run inside the error boundary."""

    def invoke(self, ctx):  # type: ignore[no-untyped-def]
        with error_boundary():
            return super().invoke(ctx)


def close_output() -> None:
    """Write what is still to be printed, in silence if nobody reads it, as behind `| head`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _output_is_closed() -> bool:
    """Return true if the standard output is a pipe whose reader, such as `head`, has ended."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def _written(error: BaseException, logs: Callable[[], Path | None]) -> Path:
    """Write the traceback of `error` to a new file and return its path."""
    directory = None
    with suppress(IterabreError, OSError):  # the run may be what cannot be read or written
        directory = logs()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", prefix="iterabre-error-", suffix=".log", dir=directory, delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    return Path(file.name)
