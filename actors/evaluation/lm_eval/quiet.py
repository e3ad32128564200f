"""Calls of lm-eval without its output."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress log lines, prints and progress bars of lm-eval; errors are still raised.

    Also keeps its bootstrap in this process (same numbers): by default it forks
    a worker per core of the machine, which Ray and CUDA do not stand.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    pool_switch = os.environ.get("DISABLE_MULTIPROC", "")  # empty means the same to lm-eval as absent
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        os.environ["DISABLE_MULTIPROC"] = pool_switch
