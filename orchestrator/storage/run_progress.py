"""How far a run is, as its driver last wrote it: `progress.json`. To read it takes no cluster."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from actors.artifacts import local_path, read_bytes, write_bytes
from orchestrator.storage.layout import RunLayout

log = logging.getLogger(__name__)

WRITE_INTERVAL_S = 10.0
LOCAL_WRITE_INTERVAL_S = 2.0
"""On a file system, where a write costs nothing."""


@dataclass(frozen=True)
class TrajectoryProgress:
    """Where one trajectory is; or, with `background`, its evaluation that goes on beside that.

    Attributes:
        counted_from, counted_since: what was done of the stage when this try of it first counted, and when.
        key: of the stage that it is at.
        waits_for: what the stage waits for; nothing while it runs.
        waits_since: when that wait began.
        waited_s: seconds that stages of this trajectory have waited since the driver started.
        places: where the stage runs, one an actor or worker.
        perplexities: of the newest measured model, by text.
        measured: one number of the newest measured model, by its name.
        phase: which model an evaluation is of, as in `orchestrator.storage.ledger.Row`.
        restarted: what was lost of the stage, and which try this is; nothing if it is the first.
        kinds_done: finished stages, by kind; `seconds_of` is how long they took.
    """

    trajectory: str
    iteration: int
    iterations: int
    stage: str
    done: int = 0
    total: int = 0
    note: str = ""
    started_at: float = 0.0
    finished: bool = False
    key: str = ""
    waits_for: str = ""
    places: Sequence[str] = ()
    stages_done: int = 0
    stages_total: int = 0
    stages_reused: int = 0
    perplexities: Mapping[str, float] = field(default_factory=dict)
    background: bool = False
    waits_since: float = 0.0
    waited_s: float = 0.0
    measured: Mapping[str, float] = field(default_factory=dict)
    phase: str = ""
    restarted: str = ""
    kinds_done: Mapping[str, int] = field(default_factory=dict)
    seconds_of: Mapping[str, float] = field(default_factory=dict)
    counted_from: int = 0
    counted_since: float = 0.0


@dataclass(frozen=True)
class Overview:
    """How far the whole run is.

    Attributes:
        stages_done, stages_total: stages that differ; what trajectories share counts once.
        started_at: when the driver began.
        left_s: the seconds that are left, as those of finished stages let expect; None while unknown.
        unknown: the kind of stage of which none has been finished, if that is why.
    """

    stages_done: int
    stages_total: int
    started_at: float
    left_s: float | None = None
    unknown: str = ""


@dataclass(frozen=True)
class RunProgress:
    """What the driver, on `host`, wrote last; `ended` if that was its last word."""

    written_at: float
    host: str
    ended: bool
    trajectories: Sequence[TrajectoryProgress]
    overview: Overview | None = None


def write_progress(store: RunLayout, progress: RunProgress) -> None:
    """Write how far the run is."""
    write_bytes(store.progress_uri, json.dumps(asdict(progress)).encode(), limit_s=WRITE_INTERVAL_S)


def read_progress(store: RunLayout) -> RunProgress | None:
    """Return how far the run was when its driver last wrote it; None if it never did, or unreadably."""
    content = read_bytes(store.progress_uri)
    if content is None:
        return None
    known = {each.name for each in fields(TrajectoryProgress)}
    try:
        stored: dict[str, Any] = json.loads(content)
        trajectories = tuple(
            TrajectoryProgress(**{name: value for name, value in each.items() if name in known})
            for each in stored["trajectories"]
        )
        overview = Overview(**stored["overview"]) if stored.get("overview") else None
        return RunProgress(stored["written_at"], stored["host"], stored["ended"], trajectories, overview)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s cannot be read: %s", store.progress_uri, error)
        return None


@contextmanager
def progress_written(
    store: RunLayout,
    snapshot: Callable[[], Sequence[TrajectoryProgress]],
    interval_s: float | None = None,
    overview: Callable[[Sequence[TrajectoryProgress]], Overview | None] = lambda _: None,
) -> Iterator[None]:
    """Write the progress now and then while the body runs, and at its end; what fails is tried again.

    `overview` makes of the trajectories' progress that of the run.
    """
    if interval_s is None:
        interval_s = WRITE_INTERVAL_S if local_path(store.uri) is None else LOCAL_WRITE_INTERVAL_S
    ended = threading.Event()
    known: list[Sequence[TrajectoryProgress]] = [()]

    def write() -> None:
        try:
            known[0] = tuple(snapshot())
        except Exception as error:  # at the end, the board may have ended before
            log.warning("the progress could not be found out: %s", error)
        try:
            host = socket.gethostname()
            now = RunProgress(time.time(), host, ended.is_set(), known[0], overview(known[0]))
            write_progress(store, now)
        except Exception as error:
            log.warning("%s could not be written: %s", store.progress_uri, error)

    def keep_writing() -> None:
        while not ended.wait(interval_s):
            write()

    thread = threading.Thread(target=keep_writing, name="progress", daemon=True)
    write()
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        write()
