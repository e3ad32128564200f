"""The stage that a thread or process is at work on: its name in Ray's dashboard, and its log.

Workers only print. What they print reaches the driver line by line, with the process it comes from; lines
with a mark in front, which the functions of this module print, tell the driver which stage that process is
at work on. So a worker that is killed loses nothing of its log, and no worker writes to the storage for it.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

MARK = "::iterabre-stage::"
"""Begins a line that is about a stage; the name of its log follows, and then nothing, or a tab and a line."""

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


@dataclass(frozen=True)
class RunningStage:
    """A stage that is being computed.

    Attributes:
        name: says kind, trajectory and iteration, for Ray's dashboard.
        log: name of its log within the run's directory of logs.
    """

    name: str
    log: str


_running: ContextVar[RunningStage | None] = ContextVar("running_stage", default=None)


def running_stage() -> RunningStage | None:
    """Return the stage that this thread is at work on."""
    return _running.get()


@contextmanager
def at_work_on(stage: RunningStage | None) -> Iterator[None]:
    """Have this thread be at work on `stage` in the body."""
    token = _running.set(stage)
    try:
        yield
    finally:
        _running.reset(token)


@contextmanager
def output_of(stage: RunningStage | None) -> Iterator[None]:
    """Have this process be at work on `stage` alone in the body: all that it prints belongs to that stage."""
    if stage is None:
        yield
        return
    begin_output(stage)
    try:
        with at_work_on(stage):
            yield
    finally:
        _print_mark("")


def begin_output(stage: RunningStage) -> None:
    """Have all that this process prints and logs from now on belong to `stage`."""
    _print_mark(stage.log)
    quiet_libraries()
    root = logging.getLogger()
    if not root.handlers:
        # What libraries warn of, and what our own packages say.
        logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
        for package in ("actors", "orchestrator"):
            logging.getLogger(package).setLevel(logging.INFO)


def quiet_libraries() -> None:
    """Keep libraries from printing progress bars, and warnings that ask nothing of the user."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # DeepSpeed warns on standard output that this machine has no GPU; a cluster's nodes may have.
    logging.getLogger("DeepSpeed").addFilter(_is_not_of_no_gpu)
    # It reports kernels that it could download for this processor.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    # What peft should not call in transformers concerns their authors.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


def _is_not_of_no_gpu(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting accelerator to CPU")


def _print_mark(log: str) -> None:
    # Both: Ray reads them independently of each other.
    for stream in (sys.stdout, sys.stderr):
        print(f"{MARK}{log}", file=stream, flush=True)


class MarkingFormatter(logging.Formatter):
    """Puts the mark of the thread's stage in front of each line, for processes that work on several."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text; each line of it marked, if it belongs to a stage."""
        text, stage = super().format(record), running_stage()
        if stage is None:
            return text
        return "\n".join(f"{MARK}{stage.log}\t{line}" for line in text.splitlines())
