"""The pool of actors on which scoring, generation and evaluation run, and single tasks, on a Ray cluster.

Modules that use it import torch and transformers inside the actors alone: the trial that
waits for a result need not load them.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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

from actors.contracts import ActorPoolSpec
from actors.errors import FAULT, IterabreError, UnexpectedError, WorkError, last_line, unexpected
from actors.out_of_memory import is_out_of_memory

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


class ActorPool:
    """Actors of one class: started on entry, killed on exit, so that the next stage can have their place.

    On entry it waits until one actor is placed; the others join when they are. It can be
    pickled while it is open: `dispatch` also works in a task that the pool is passed to.

    Args:
        spec: how many actors, and what each holds.
        actor_class: a class with a method `work`, which takes a shard and returns its result.
        arguments: those of the class.
        setting: the setting under `execution` that sizes the pool, for errors: "scoring".

    Raises:
        WorkError: on entry, no actor was placed in time; says what was requested and what is free.
    """

    def __init__(self, spec: ActorPoolSpec, actor_class: type, *arguments: Any, setting: str):
        self._spec, self._setting = spec, setting
        self._actor_class, self._arguments = actor_class, arguments
        self._actors: list[ActorHandle] = []

    def __enter__(self) -> Self:
        spec = self._spec
        remote = ray.remote(self._actor_class).options(**_resources(spec.cpus, spec.gpus), max_restarts=3)
        self._actors = [remote.remote(*self._arguments) for _ in range(spec.actors)]
        try:
            starting = {actor.__ray_ready__.remote(): actor for actor in self._actors}
            placed, later = ray.wait(list(starting), num_returns=1, timeout=spec.start_timeout_s)
            if not placed:
                free = ray.available_resources()
                raise WorkError(
                    f"{self._setting} got no place with {spec.cpus:g} CPU and {spec.gpus:g} GPU within "
                    f"{spec.start_timeout_s:g} s: free are {free.get('CPU', 0):g} CPU and "
                    f"{free.get('GPU', 0):g} GPU. Lower execution.{self._setting} "
                    "or wait for other work to end, then use --resume"
                )
        except BaseException:
            self.__exit__()
            raise
        self._actors = [starting[ready] for ready in (*placed, *later)]
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
        submit = submit or (lambda actor, shard: actor.work.remote(shard))
        waiting = deque(shards)
        num_left = len(waiting)
        idle: list[ActorHandle] = []
        pending: dict[ray.ObjectRef, tuple[ActorHandle, list[ShardT]]] = {
            (busy if busy and position == 0 else actor.__ray_ready__.remote()): (actor, [])
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
                if error.actor_init_failed:
                    raise WorkError(f"a {self._setting} actor could not start: {last_line(error)}") from error
                if submitted:
                    log.warning("a %s actor was lost (%s); its shard goes to another", self._setting, error)
                    waiting.extend(submitted)
                unavailable = isinstance(error, ActorUnavailableError)
                if unavailable:
                    # Its process has ended and Ray has not noticed yet: called at once, it would fail again.
                    time.sleep(RETRY_S)
                if submitted or unavailable:
                    pending[actor.__ray_ready__.remote()] = (actor, [])
                continue
            idle.append(actor)
            for shard in submitted:
                num_left -= 1
                yield shard, result


def run_in_task(
    work: Callable[..., ResultT], *arguments: Any, cpus: float = 0, gpus: float = 0, **named: Any
) -> ResultT:
    """Return `work(*arguments, **named)`, run in a process of its own; again on another node if that is lost.

    A trial exists as long as its trajectory and so only waits: it would else keep the
    libraries of every stage loaded.
    """
    task = ray.remote(work).options(**_resources(cpus, gpus), max_retries=3)
    result: ResultT = result_of(task.remote(*arguments, **named))
    return result


def result_of(object_ref: ray.ObjectRef) -> Any:
    """Return the value, or raise an error meant for the user as itself rather than wrapped by Ray.

    Losses (`is_loss`) and a lack of memory (`is_out_of_memory`) are left as they are.

    Raises:
        UnexpectedError: the work raised what nobody expects. To try again would meet it again.
    """
    try:
        return ray.get(object_ref)
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


def _resources(cpus: float, gpus: float) -> dict[str, Any]:
    """Return the options of an actor or task that holds `cpus` and `gpus` anywhere in the cluster.

    DEFAULT scheduling: inside a Tune trial, it would else be held to the trial's own small share.
    """
    return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "DEFAULT"}
