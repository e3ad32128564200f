"""The pool of actors on which scoring, generation and evaluation run, and single tasks, on a Ray cluster.

Modules that use it import torch and transformers inside the actors alone: the trial that
waits for a result need not load them.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, Self, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from actors.contracts import ActorPoolSpec
from actors.errors import IterabreError, WorkError, unexpected
from actors.stage_output import RunningStage, begin_output, output_of, running_stage

log = logging.getLogger(__name__)

ShardT = TypeVar("ShardT")
ResultT = TypeVar("ResultT")

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
        remote = ray.remote(_of_stage(self._actor_class))
        remote = remote.options(**_resources(spec.cpus, spec.gpus), max_restarts=3)
        stage = running_stage()
        self._actors = [remote.remote(stage, *self._arguments) for _ in range(spec.actors)]
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
        submit = submit or (lambda actor, shard: actor.work.options(**task_name()).remote(shard))
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
    task = ray.remote(_run_for_stage).options(
        **_resources(cpus, gpus), max_retries=3, **task_name(work.__name__)
    )
    result: ResultT = result_of(task.remote(running_stage(), work, *arguments, **named))
    return result


def _run_for_stage(
    stage: RunningStage | None, work: Callable[..., ResultT], *arguments: Any, **named: Any
) -> ResultT:
    with output_of(stage):
        return work(*arguments, **named)


def task_name(otherwise: str | None = None) -> dict[str, Any]:
    """Return the option by which Ray's dashboard shows the stage that a task or a call of an actor is for."""
    stage = running_stage()
    name = otherwise if stage is None else stage.name
    return {} if name is None else {"name": name}


@cache
def _of_stage(actor_class: type) -> type:
    """Return the class with one more argument: the stage that its output is for and that names it."""

    class OfStage(actor_class):  # type: ignore[misc, valid-type]
        def __init__(self, stage: RunningStage | None, *arguments: Any):
            self._of_stage = stage
            if stage is not None:
                begin_output(stage)
            super().__init__(*arguments)

        def __repr__(self) -> str:
            return actor_class.__name__ if self._of_stage is None else self._of_stage.name

    OfStage.__name__ = OfStage.__qualname__ = actor_class.__name__
    OfStage.__doc__ = actor_class.__doc__
    return OfStage


def result_of(object_ref: ray.ObjectRef) -> Any:
    """Return the value, or raise an error meant for the user as itself rather than wrapped by Ray.

    Raises:
        UnexpectedError: the work raised what nobody expects. To try again would meet it again: it is no
            error of Ray's, whose errors are left as they are.
    """
    try:
        return ray.get(object_ref)
    except RayTaskError as error:
        if isinstance(error.cause, IterabreError):
            raise error.cause from None
        if isinstance(error.cause, RayError):
            raise
        log.error("an actor or task failed: %s", error.traceback_str)
        raise unexpected(error.cause) from error


def _resources(cpus: float, gpus: float) -> dict[str, Any]:
    """Return the options of an actor or task that holds `cpus` and `gpus` anywhere in the cluster.

    DEFAULT scheduling: inside a Tune trial, it would else be held to the trial's own small share.
    """
    return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "DEFAULT"}
