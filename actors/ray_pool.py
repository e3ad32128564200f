"""The pool of actors on which scoring, generation and evaluation run, and single tasks, on a Ray cluster.

Modules that use it import torch and transformers inside the actors alone: the trial that
waits for a result need not load them.
"""

import logging
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnavailableError,
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskPlacementGroupRemoved,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from actors.contracts import (
    ActorPoolSpec,
    ClusterProgress,
    Progress,
    WaitingTime,
    no_progress,
    on_cluster,
)
from actors.errors import FAULT, IterabreError, UnexpectedError, WorkError, last_line, unexpected
from actors.out_of_memory import is_out_of_memory
from actors.stage_output import RunningStage, begin_output, output_of, running_stage

log = logging.getLogger(__name__)

ShardT = TypeVar("ShardT")
ResultT = TypeVar("ResultT")

LOSSES = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    LocalRayletDiedError,
    ObjectLostError,  # also of an owner that has ended, and of what cannot be reconstructed
    ActorPlacementGroupRemoved,
    TaskPlacementGroupRemoved,
    ActorUnschedulableError,  # their node has gone
    TaskUnschedulableError,
)
"""What Ray raises when a process, a machine or an object is lost: all else is not mended by another try."""

RETRY_S = 0.5
"""Pause before the next call to an actor that did not respond."""


RESTARTS = 3
"""How often Ray starts an actor again whose process or machine is lost."""

REPORT_S = 2.0
"""How often a stage without a place reports what it waits for."""

STARTING_S = 5.0
"""What starting a process takes at most: less is no wait for room."""


@dataclass(frozen=True)
class Place:
    """Where an actor is, and for how long."""

    name: str
    seconds: float


class ActorPool:
    """Actors of one class: started on entry, killed on exit, so that the next stage can have their place.

    On entry it waits until one actor is placed, however long that takes unless a limit is set; the
    others join when they are. It can be pickled while it is open: `dispatch` also works in a task that
    the pool is passed to.

    Args:
        spec: how many actors, and what each holds.
        actor_class: a class with a method `work`, which takes a shard and returns its result.
        arguments: those of the class.
        setting: the setting under `execution` that sizes the pool, for errors: "scoring".
        progress: is called with what the pool waits for, and where its actors are.

    Raises:
        WorkError: on entry, no actor was placed in time; says what was requested and what is free.
    """

    def __init__(
        self,
        spec: ActorPoolSpec,
        actor_class: type,
        *arguments: Any,
        setting: str,
        progress: Progress = no_progress,
    ):
        self._spec, self._setting = spec, setting
        self._actor_class, self._arguments = actor_class, arguments
        self._actors: list[ActorHandle] = []
        self._progress = on_cluster(progress)
        self._places: dict[ActorHandle, str] = {}

    def __enter__(self) -> Self:
        spec, asked = self._spec, time.monotonic()
        remote = ray.remote(_placed(self._actor_class)).options(**_resources(spec), max_restarts=RESTARTS)
        stage = running_stage()
        self._actors = [remote.remote(stage, *self._arguments) for _ in range(spec.actors)]
        try:
            starting = {actor.place.remote(): actor for actor in self._actors}
            with reporting_wait(self._progress, _needs(spec), "GPU" if spec.gpus else "CPU"):
                placed, later = ray.wait(list(starting), num_returns=1, timeout=spec.start_timeout_s)
            if not placed:
                free = ray.available_resources()
                raise WorkError(
                    f"{self._setting} got no place with {spec.cpus:g} CPU and {spec.gpus:g} GPU within "
                    f"{spec.start_timeout_s:g} s: free are {free.get('CPU', 0):g} CPU and "
                    f"{free.get('GPU', 0):g} GPU. Lower execution.{self._setting} "
                    "or wait for other work to end, then use --resume"
                )
            place: Place = result_of(placed[0])
        except BaseException:
            self.__exit__()
            raise
        waited_s = time.monotonic() - asked - place.seconds
        if waited_s > STARTING_S:
            self._progress.waited(waited_s)
        self._actors = [starting[ready] for ready in (*placed, *later)]
        self._is_at(self.first, place)
        return self

    def __exit__(self, *_error: object) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def __len__(self) -> int:
        return len(self._actors)

    @property
    def first(self) -> ActorHandle:
        """The actor that was placed first."""
        return self._actors[0]

    def _is_at(self, actor: ActorHandle, place: Place) -> None:
        if self._places.get(actor) != place.name:
            self._places[actor] = place.name
            self._progress.runs_on(sorted(self._places.values()))

    def dispatch(
        self,
        shards: Iterable[ShardT],
        submit: Callable[[ActorHandle, ShardT], ray.ObjectRef] | None = None,
        busy: ray.ObjectRef | None = None,
    ) -> Iterator[tuple[ShardT, Any]]:
        """Yield each shard with its result; every actor gets the next shard as soon as it is idle.

        Only a lost shard is run again: an actor that Ray may restart is called until
        it answers, one that has ended is dropped.

        Args:
            shards: what to compute; all of one pass.
            submit: starts the work on a shard; the actors' own method `work` if not given.
            busy: the result that `first` is at work on; it takes shards when that is there.

        Raises:
            WorkError: all actors are lost.
        """
        submit = submit or (lambda actor, shard: actor.work.options(**task_name()).remote(shard))
        waiting, losses = deque(shards), Counter[ActorHandle]()
        num_left = len(waiting)
        idle: list[ActorHandle] = []
        pending: dict[ray.ObjectRef, tuple[ActorHandle, list[ShardT]]] = {
            (busy if busy and position == 0 else actor.place.remote()): (actor, [])
            for position, actor in enumerate(self._actors)
        }
        while num_left:
            while idle and waiting:
                actor, shard = idle.pop(), waiting.popleft()
                pending[submit(actor, shard)] = (actor, [shard])
            if not pending:
                raise WorkError(
                    f"all {len(self)} {self._setting} actors were lost; see the run's logs, then use --resume"
                )
            (done,), _ = ray.wait(list(pending), num_returns=1)
            actor, submitted = pending.pop(done)
            try:
                result = result_of(done)
            except RayActorError as error:
                if submitted:
                    log.warning("a %s actor was lost (%s); its shard goes to another", self._setting, error)
                    waiting.extend(submitted)
                    losses[actor] += 1
                    tries = f"restarted, try {losses[actor]} of {RESTARTS}"
                    again = tries if losses[actor] <= RESTARTS else "the others go on"
                    self._progress.restarted(f"lost an actor; {again}")
                unavailable = isinstance(error, ActorUnavailableError)
                if unavailable:
                    # Its process has ended and Ray has not noticed yet: called at once, it would fail again.
                    time.sleep(RETRY_S)
                if submitted or unavailable:
                    pending[actor.place.remote()] = (actor, [])
                continue
            if isinstance(result, Place):
                self._is_at(actor, result)
            idle.append(actor)
            for shard in submitted:
                num_left -= 1
                yield shard, result


def _placed(actor_class: type) -> type:
    """Return the class with a method that says where the actor is and since when.

    Its first argument is the stage that the output of its actors is for, which names them in the dashboard.
    """

    class Placed(actor_class):  # type: ignore[misc]
        def __init__(self, stage: RunningStage | None, *arguments: Any):
            self._placed_at = time.monotonic()
            self._of_stage = stage
            if stage is not None:
                begin_output(stage)
            super().__init__(*arguments)

        def __repr__(self) -> str:
            return actor_class.__name__ if self._of_stage is None else self._of_stage.name

        def place(self) -> Place:
            return Place(here(), time.monotonic() - self._placed_at)

    Placed.__name__ = Placed.__qualname__ = actor_class.__name__
    return Placed


def here() -> str:
    """Return the host of this process, and the GPUs that Ray has given to it."""
    gpus = ray.get_gpu_ids()
    return " ".join([socket.gethostname(), *(f"GPU {gpu}" for gpu in gpus)])


@contextmanager
def reporting_wait(progress: ClusterProgress, needs: str, unit: str) -> Iterator[None]:
    """Report while the body waits what it waits for, and what of it is free in the cluster."""
    placed = threading.Event()

    def report() -> None:
        while not placed.wait(REPORT_S):
            with suppress(Exception):  # the head may be away for a moment
                free, total = ray.available_resources(), ray.cluster_resources()
                said = f"free are {free.get(unit, 0):g} of {total.get(unit, 0):g} {unit}"
                progress.waits_for(f"{needs}; {said}")

    reporting = threading.Thread(target=report, name="waiting", daemon=True)
    reporting.start()
    try:
        yield
    finally:
        placed.set()
        reporting.join()


def run_in_task(
    work: Callable[..., ResultT], *arguments: Any, progress: Progress = no_progress, **named: Any
) -> ResultT:
    """Return `work(*arguments, progress=progress, **named)`, run in a process of its own that holds nothing.

    It is run again on another node if that is lost. A trial exists as long as its trajectory and so only
    waits: it would else keep the libraries of every stage loaded.
    """
    task = ray.remote(_counting_waits).options(
        num_cpus=0, max_retries=3, scheduling_strategy="DEFAULT", **task_name(work.__name__)
    )
    result, waited_s = result_of(task.remote(running_stage(), work, arguments, named, progress))
    on_cluster(progress).waited(waited_s)
    return result


def _counting_waits(
    stage: RunningStage | None,
    work: Callable[..., ResultT],
    arguments: tuple[Any, ...],
    named: Mapping[str, Any],
    progress: Progress,
) -> tuple[ResultT, float]:
    """Return the result of the work, and for how long it waited: the caller's progress is another copy."""
    counting = WaitingTime(progress)
    with output_of(stage):
        return work(*arguments, progress=counting, **named), counting.waited_s


def task_name(otherwise: str | None = None) -> dict[str, Any]:
    """Return the option by which Ray's dashboard shows the stage that a task or a call of an actor is for."""
    stage = running_stage()
    name = otherwise if stage is None else stage.name
    return {} if name is None else {"name": name}


def result_of(object_ref: ray.ObjectRef) -> Any:
    """Return the value, or raise an error meant for the user as itself rather than wrapped by Ray.

    Losses (`is_loss`) and a lack of memory (`is_out_of_memory`) are left as they are.

    Raises:
        UnexpectedError: the work raised what nobody expects. To try again would meet it again.
    """
    try:
        return ray.get(object_ref)
    except RayActorError as error:
        if error.actor_init_failed:
            raise UnexpectedError(f"an actor could not start: {last_line(error)}: {FAULT}") from error
        raise
    except RayTaskError as error:
        cause = cause_of(error)
        if isinstance(cause, IterabreError):
            raise cause from None
        if is_loss(cause) or is_out_of_memory(cause):
            raise cause from error
        log.error("an actor or task failed: %s", error.traceback_str)
        if type(cause) is RayError:  # in place of an exception that cannot be pickled; it has its traceback
            raise UnexpectedError(f"{last_line(cause)}: {FAULT}") from error
        raise unexpected(cause) from error


def cause_of(error: BaseException) -> BaseException:
    """Return what was raised where the work is done, without the wrappers of the tasks that it passed."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def is_loss(error: BaseException) -> bool:
    """Return whether a process, machine or object was lost, so that another try may succeed.

    An actor that raised when it was made is none: it would raise again.
    """
    cause = cause_of(error)
    failed_start = isinstance(cause, RayActorError) and cause.actor_init_failed
    return isinstance(cause, LOSSES) and not failed_start


def _resources(spec: ActorPoolSpec) -> dict[str, Any]:
    """Return the options of an actor that holds what the spec says, on any node that suits.

    DEFAULT scheduling: inside a Tune trial, it would else be held to the trial's own small share.
    """
    # Another release of Ray in that environment could not talk to the cluster's.
    own = [*spec.packages, f"ray=={ray.__version__}"] if spec.packages else []
    return {
        **({"runtime_env": {"uv": own}} if own else {}),
        "num_cpus": spec.cpus,
        "num_gpus": spec.gpus,
        "memory": spec.memory_bytes or None,
        "accelerator_type": spec.accelerator,
        "label_selector": dict(spec.labels) or None,
        "scheduling_strategy": "DEFAULT",
    }


def _needs(spec: ActorPoolSpec) -> str:
    """Return what an actor needs, in words."""
    held = (
        f"{spec.gpus:g} {spec.accelerator or ''} GPU".replace("  ", " ")
        if spec.gpus
        else f"{spec.cpus:g} CPU"
    )
    labels = [f"{name}={value}" for name, value in spec.labels.items()]
    return " ".join([held, "on one node", *(["with", *labels] if labels else [])])
