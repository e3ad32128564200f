"""Logs of a run: of driver and workers, and one of each stage. Written by the driver, read from any machine.

A log is a local file. Where the run lies in an object store, it is uploaded now and then, and at the end.
Losing a log never fails a stage.
"""

import logging
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from actors.artifacts import join, list_files, local_path, read_bytes, write_bytes
from actors.stage_output import LOG_FORMAT, MARK, running_stage
from orchestrator.storage.layout import RunLayout

log = logging.getLogger(__name__)

DRIVER_LOG, WORKERS_LOG = "driver.log", "workers.log"

UPLOAD_INTERVAL_S = 15.0
"""Between two uploads of a log, for each MB that it has."""

MAX_BYTES = 32 * 2**20
"""Of a stage's log; further lines are left out."""

NOISE = ("PlacementGroupCleaner", "_AutoscalingCoordinatorActor")
"""Actors of Ray's own that print only what they fail at when a job ends."""

NOISY_LINES = ("Actor with class name: 'PreemptionWatcher'",)
"""In lines that Ray prints for its own developers."""

STAGE_LOG = re.compile(r"(\d+)-(.+)-([0-9a-f]+)\.log")


@dataclass(frozen=True)
class StageLog:
    """A stage's log; `name` is its path within the directory of logs."""

    name: str
    trajectory: str
    iteration: int
    stage: str
    key: str
    size_bytes: int


class LogWriter:
    """Appends lines to the logs of a run; from any thread."""

    def __init__(self, store: RunLayout) -> None:
        self._directory = store.logs_dir
        self._uri = None if local_path(store.uri) is not None else store.logs_uri
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._sizes_before = {name: self._size(name) for name in (DRIVER_LOG, WORKERS_LOG)}
        self._failed = False
        self._uploaded: dict[str, tuple[int, float]] = {}
        self._former: dict[str, bytes] = {}

    def write(self, name: str, lines: Iterable[str]) -> None:
        """Append lines, without their ends, to the log `name`."""
        data = "".join(f"{line}\n" for line in lines).encode(errors="replace")
        try:
            with self._lock:
                self._append(name, data)
        except OSError as error:
            if not self._failed:  # once: the disk is full, perhaps
                self._failed = True
                log.warning("log %s cannot be written: %s", self._directory / name, error)

    def _append(self, name: str, data: bytes) -> None:
        file = self._directory / name
        if name not in self._sizes:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._sizes[name] = self._sizes_before[name] = self._size(name)
        if "/" in name and self._sizes[name] + len(data) > MAX_BYTES:
            if self._sizes[name] > MAX_BYTES:
                return
            data = f"(what follows is left out: this log has {MAX_BYTES / 2**20:.0f} MB)\n".encode()
            self._sizes[name] = MAX_BYTES
        with file.open("ab") as target:
            target.write(data)
        self._sizes[name] += len(data)

    def _size(self, name: str) -> int:
        file = self._directory / name
        return file.stat().st_size if file.exists() else 0

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """Upload the logs now and then while the body runs, and at its end, to an object store."""
        if self._uri is None:
            yield
            return
        ended = threading.Event()

        def keep_uploading() -> None:
            while not ended.wait(UPLOAD_INTERVAL_S / 5):
                self._upload(due_only=True)

        thread = threading.Thread(target=keep_uploading, name="logs", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._upload(due_only=False)

    def upload(self, name: str) -> None:
        """Have a log uploaded at the next opportunity: its stage has ended."""
        size, _ = self._uploaded.get(name, (0, 0.0))
        self._uploaded[name] = (size, 0.0)

    def _upload(self, due_only: bool) -> None:
        for name in list(self._sizes_before):
            try:
                size = self._size(name)
                before, when = self._uploaded.get(name, (0, 0.0))
                interval_s = UPLOAD_INTERVAL_S * max(1.0, size / 2**20)
                if size == before or (due_only and time.monotonic() - when < interval_s):
                    continue
                self._uploaded[name] = (size, time.monotonic())
                assert self._uri is not None
                uri = join(self._uri, name)
                if name not in self._former:
                    self._former[name] = read_bytes(uri) or b""
                former, content = self._former[name], (self._directory / name).read_bytes()
                if not content.startswith(former):  # a driver on another machine wrote it
                    content = former + content[self._sizes_before[name] :]
                write_bytes(uri, content, limit_s=UPLOAD_INTERVAL_S)
            except Exception as error:
                self._uploaded[name] = (0, time.monotonic())
                log.warning("log %s could not be uploaded: %s", name, error)


class WorkerOutput:
    """Sorts what worker processes print into the logs: a stage's, or that of all workers.

    A mark (`actors.stage_output`) says which stage the further lines of its process, or this one line,
    belong to.
    """

    def __init__(self, logs: LogWriter) -> None:
        self._logs = logs
        self._stage_of: dict[tuple[str, Any], str] = {}

    def __call__(self, data: Mapping[str, Any]) -> None:
        """Write lines as Ray sends them, with the process that printed them."""
        name = data.get("actor_name") or data.get("task_name") or "worker"
        if name in NOISE:
            return
        place = f"pid={data.get('pid')} {data.get('ip')}"
        process = (place, data.get("is_err"))
        sorted_lines: dict[str, list[str]] = {}
        for line in data.get("lines", []):
            stage = self._stage_of.get(process, "")
            if line.startswith(MARK):
                marked, tab, line = line.removeprefix(MARK).partition("\t")
                if not tab:
                    if stage:
                        self._logs.upload(stage)
                    self._stage_of[process] = marked
                    continue
                sorted_lines.setdefault(marked, []).append(line)
                stage = ""  # the overview has it, too
            if line.strip() and not any(known in line for known in NOISY_LINES):
                text = f"({place}) {line}" if stage else f"({name} {place}) {line}"
                sorted_lines.setdefault(stage or WORKERS_LOG, []).append(text)
        for log_name, found in sorted_lines.items():
            self._logs.write(log_name, found)


class StageLogHandler(logging.Handler):
    """Writes records of stages that are computed in this process to their logs."""

    def __init__(self, logs: LogWriter) -> None:
        super().__init__()
        self._logs = logs
        self.setFormatter(logging.Formatter(LOG_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, if its thread is at work on a stage."""
        if stage := running_stage():
            self._logs.write(stage.log, self.format(record).splitlines())


def stage_logs(store: RunLayout) -> list[StageLog]:
    """Return the logs of the run's stages, by trajectory and in the order of its iterations."""
    found = []
    for info in list_files(store.logs_uri, recursive=True):
        trajectory, _, file = info.path.rpartition("/")
        trajectory = trajectory.rpartition("/")[2]
        if match := STAGE_LOG.fullmatch(file):
            iteration, stage, key = match.groups()
            name = f"{trajectory}/{file}"
            found.append(StageLog(name, trajectory, int(iteration), stage, key, info.size or 0))
    return sorted(found, key=lambda each: (each.trajectory, each.iteration))


def read_log(store: RunLayout, name: str) -> bytes:
    """Return the content of a log; empty if there is none."""
    return read_bytes(join(store.logs_uri, name)) or b""
