"""Publishes what is new in the ledger to trackers, while a campaign runs and at its end.

The ledger stays the truth: trials have no part in tracking, and what a tracker that cannot be
reached lacks is published later. Which parts of the ledger were published is kept in the run,
so a resumed campaign goes on where the last one stopped.
"""

import json
import logging
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from typing import Any, Literal, Protocol

from actors.artifacts import filesystem, join, list_files, read_bytes, write_bytes
from actors.contracts import digest
from actors.errors import WorkError
from orchestrator.planning.plan import CampaignPlan, TrajectoryPlan
from orchestrator.storage.layout import CARD
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import read_statuses

log = logging.getLogger(__name__)

INTERVAL_S = 15.0
OPENING_WAIT_S = 10.0
LAST_WAIT_S = 30.0
"""How long the start and the end of a campaign wait for trackers."""

Axis = Literal["iteration", "training_step", "global_step"]
"""What a curve's steps count: iterations, optimizer steps of one recovery, or those of all recoveries."""

Parameters = Mapping[str, str | float | bool]
State = Literal["done", "failed", "unfinished"]


@dataclass(frozen=True)
class Point:
    """A number of a curve, at a step of its axis."""

    name: str
    value: float
    step: int
    when: datetime
    axis: Axis = "iteration"


@dataclass(frozen=True)
class Batch:
    """What is not published yet of one trajectory.

    `run_id` identifies the tracker's run of the trajectory: the same after a resume, another in another
    directory. `number` is how many parts of the ledger were published before: the same batch, should it
    come twice, has the same number.
    """

    trajectory: str
    run_id: str
    parameters: Parameters
    points: Sequence[Point]
    number: int


class Tracker(Protocol):
    """Keeps a run for each trajectory, and one for the campaign, which has the files.

    `failures` are what it raises when it cannot be reached; `keeps` is true if what an earlier driver
    published is still there and need not be published again.
    """

    failures: tuple[type[Exception], ...]
    keeps: bool

    def open(self) -> str:
        """Open the campaign's run; return its address, or the command that shows it."""

    def write(self, batch: Batch) -> None:
        """Add the points to the trajectory's run, which may be there already."""

    def close(self, states: Mapping[str, State]) -> None:
        """End every run; `states` says how far each trajectory is."""

    def attach(self, files: Mapping[str, bytes]) -> None:
        """Add files to the campaign's run, by their paths within it, in place of former ones."""


def points(
    rows: Iterable[Mapping[str, Any]], steps_before: Mapping[int, int] | None = None
) -> Iterator[Point]:
    """Yield the points of curves that rows of the ledger make.

    Names are STAGE/METRIC, followed by the iteration where the step is one of training, and by the
    layer where there is one. The unpruned and the recovered models make up one curve; what was measured
    before recovery is another. Losses have a second curve, training/METRIC, over all iterations.

    Args:
        steps_before: for each iteration, the optimizer steps of all recoveries before its own.
    """
    for row in rows:
        apart = row["phase"] if row["phase"] in ("pruned", "start") else None
        parts = ["_".join(filter(None, (row["stage"], apart))), row["metric"]]
        in_training = row["step"] is not None
        if in_training:
            parts.append(f"iteration_{row['iteration']:02d}")
        if row["layer"] is not None:
            parts.append(f"layer_{row['layer']:02d}")
        # The characters that all trackers take.
        name = re.sub(r"[^A-Za-z0-9_./-]", "_", "/".join(parts))
        step = row["step"] if in_training else row["iteration"]
        yield Point(name, row["value"], step, row["when"], "training_step" if in_training else "iteration")
        if in_training and apart is None and row["metric"].startswith("loss"):
            step += (steps_before or {}).get(row["iteration"], 0)
            yield Point(f"training/{row['metric']}", row["value"], step, row["when"], "global_step")


def steps_before_iterations(rows: Iterable[Mapping[str, Any]]) -> Mapping[int, int]:
    """Return, for each iteration that trains, the optimizer steps of the recoveries before its own.

    Args:
        rows: of the ledger, of one trajectory.
    """
    steps = Counter(
        row["iteration"]
        for row in rows
        if (row["stage"], row["phase"], row["metric"]) == ("recover", None, "loss")
    )
    ends = accumulate(steps[iteration] for iteration in sorted(steps))
    return dict(zip(sorted(steps), [0, *ends], strict=False))


def parameters(trajectory: TrajectoryPlan) -> Parameters:
    """Return what distinguishes the trajectory: model, seed, and every field of its method."""
    method = trajectory.method.model_dump(mode="json")
    named = {"model": trajectory.model_id, "method": method.pop("name"), "seed": trajectory.seed}
    return {**named, **dict(_flat(method))}


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float | bool]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, json.dumps(value) if isinstance(value, list) else value


class Publisher:
    """Publishes each part of the ledger to one tracker once, or once more after a crash in between."""

    def __init__(self, name: str, tracker: Tracker, plan: CampaignPlan, store: Store):
        self._name = name
        self._tracker = tracker
        self._plan = plan
        self._store = store
        self._ledger = Ledger(store.ledger_uri)
        self._published: list[str] | None = None
        self._warned = False
        self.address: str | None = None

    def open(self) -> None:
        """Open the campaign's run, and keep its address if it can be had."""
        with self._warned_of_failures():
            self.address = self._tracker.open()

    def publish(self) -> None:
        """Publish what is new."""
        with self._warned_of_failures():
            if self._published is None:
                state = read_bytes(self._store.published_uri(self._name)) if self._tracker.keeps else None
                self._published = json.loads(state or b"[]")
            new = sorted(set(self._ledger.parts()) - set(self._published))
            if not new:
                return
            by_trajectory: defaultdict[str, list[Any]] = defaultdict(list)
            for row in self._ledger.read_parts(new).to_pylist():
                by_trajectory[row["trajectory"]].append(row)
            for trajectory, rows in by_trajectory.items():
                run_id = digest([self._store.uri, trajectory])[:16]
                described = parameters(self._plan.find(trajectory))
                number = len(self._published)
                found = list(points(rows, self._steps_before(trajectory, rows)))
                self._tracker.write(Batch(trajectory, run_id, described, found, number))
            self._published = [*self._published, *new]
            write_bytes(self._store.published_uri(self._name), json.dumps(self._published).encode())
            self._warned = False

    def close(self) -> None:
        """Publish what is new, and how far each trajectory is."""
        self.publish()
        with self._warned_of_failures():
            statuses = {name: status.state for name, status in read_statuses(self._store).items()}
            states: dict[str, State] = {}
            for trajectory in self._plan.trajectories:
                status = statuses.get(trajectory.id)
                states[trajectory.id] = (
                    "done" if status == "done" else "failed" if status == "failed" else "unfinished"
                )
            self._tracker.close(states)

    def _steps_before(self, trajectory: str, rows: Iterable[Mapping[str, Any]]) -> Mapping[int, int]:
        """Return `steps_before_iterations` of the whole ledger, if any of the rows is one of training."""
        if all(row["step"] is None for row in rows):
            return {}
        recoveries = [part for part in self._ledger.parts(f"{trajectory}-") if "-recover-" in part]
        found = self._ledger.read_parts(recoveries).to_pylist()
        return steps_before_iterations(row for row in found if row["trajectory"] == trajectory)

    @contextmanager
    def _warned_of_failures(self) -> Iterator[None]:
        """Warn of a tracker that fails, once until it works again; the campaign goes on."""
        expected: tuple[type[Exception], ...] = (WorkError, OSError, *self._tracker.failures)
        try:
            yield
        except expected as error:
            if not self._warned:
                log.warning("tracking.%s failed, and is tried again until the end: %s", self._name, error)
            self._warned = True


@contextmanager
def published(
    trackers: Mapping[str, Tracker],
    plan: CampaignPlan,
    store: Store,
    tell: Callable[[str], None] = log.info,
    interval_s: float = INTERVAL_S,
) -> Iterator[None]:
    """Publish to the trackers while the body runs, in a thread for each, and once more at its end.

    Args:
        tell: is called with where each tracker shows the campaign, before the body.
    """
    ended = threading.Event()

    def keep_publishing(publisher: Publisher, opened: threading.Event) -> None:
        publisher.open()
        opened.set()
        while not ended.wait(interval_s):
            publisher.publish()
        publisher.close()

    threads: dict[str, threading.Thread] = {}
    opening: dict[str, tuple[Publisher, threading.Event]] = {}
    for name, tracker in trackers.items():
        opening[name] = (Publisher(name, tracker, plan, store), threading.Event())
        threads[name] = threading.Thread(target=keep_publishing, args=opening[name], daemon=True)
        threads[name].start()
    for name, (publisher, opened) in opening.items():
        opened.wait(OPENING_WAIT_S)
        if publisher.address is not None:
            tell(f"tracking.{name}: {publisher.address}")
    try:
        yield
    finally:
        ended.set()
        for name, thread in threads.items():
            thread.join(LAST_WAIT_S)
            if thread.is_alive():
                log.warning("tracking.%s does not answer; --resume tells it what it lacks", name)


def attach_files(
    trackers: Mapping[str, Tracker], store: Store, tell: Callable[[str], None] = log.warning
) -> None:
    """Give each tracker the campaign's configuration, report, and models' cards.

    Args:
        tell: is called with a warning of a tracker that fails.
    """
    if not trackers:
        return
    root = filesystem(store.uri)[1]
    models = [file for file in list_files(store.all_models_uri, recursive=True) if file.base_name == CARD]
    paths = [
        "campaign.json",
        *(file.path.removeprefix(f"{root}/") for file in (*list_files(store.report_uri, True), *models)),
    ]
    files = {path: content for path in paths if (content := read_bytes(join(store.uri, path))) is not None}
    for name, tracker in trackers.items():
        expected: tuple[type[Exception], ...] = (WorkError, OSError, *tracker.failures)
        try:
            tracker.attach(files)
        except expected as error:
            tell(f"tracking.{name} did not take the report; --resume gives it once more: {error}")
