"""The command line, run in the test's own process."""

import contextlib
import io
from dataclasses import dataclass
from unittest.mock import patch

from orchestrator.cli.app import main


@dataclass(frozen=True)
class Answer:
    """What a command left on the terminal."""

    exit_code: int
    out: str
    err: str


def iterabre(*arguments: object) -> Answer:
    """Run `iterabre ARGUMENTS...`."""
    out, err = io.StringIO(), io.StringIO()
    exit_code = 0
    with (
        patch("sys.argv", ["iterabre", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            exit_code = int(ended.code or 0)
    return Answer(exit_code, out.getvalue(), err.getvalue())
