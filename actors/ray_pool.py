"""Placing work on a Ray cluster: what scoring, generation, evaluation and export have in common.

Modules that place work import what computes where it is done: the trial that asks for it
need not load torch and transformers.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from actors.contracts import ExportResult, ExportSpec
from actors.errors import IterabreError, WorkError, unexpected

log = logging.getLogger(__name__)

ShareT = TypeVar("ShareT")
ResultT = TypeVar("ResultT")

RETRY_S = 0.5
"""Pause before an actor that does not answer is asked again."""


def placement(cpus: float, gpus: float) -> dict[str, Any]:
    """Options of an actor or task that holds `cpus` and `gpus` anywhere in the cluster.

    DEFAULT scheduling: inside a Tune trial, it would else be held to the trial's own small share.
    """
    return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "DEFAULT"}


def wait_for_place(ready: list[ray.ObjectRef], what: str, cpus: float, gpus: float, timeout_s: float) -> None:
    """Wait until one of the `ready` answers has come.

    Raises:
        WorkError: none came in time; says what was asked for and what is free.
    """
    if not ray.wait(ready, num_returns=1, timeout=timeout_s)[0]:
        free = ray.available_resources()
        raise WorkError(
            f"{what} got no place with {cpus:g} CPU and {gpus:g} GPU within {timeout_s:g} s: free are "
            f"{free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU. Lower execution.{what} "
            "or wait for other work to end, then use --resume"
        )


def result_of(reference: ray.ObjectRef) -> Any:
    """The value, with an error meant for the user raised as itself rather than wrapped by Ray.

    Raises:
        UnexpectedError: the work raised what nobody expects. To try again would meet it again: it is no
            error of Ray's, whose errors are left as they are.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, IterabreError):
            raise error.cause from None
        if isinstance(error.cause, RayError):
            raise
        log.error("an actor or task failed: %s", error.traceback_str)
        raise unexpected(error.cause) from error


@contextmanager
def pool_of(actors: int, start: Callable[[], ActorHandle]) -> Iterator[list[ActorHandle]]:
    """So many actors, all gone afterwards, so that the next stage can have their place."""
    pool = [start() for _ in range(actors)]
    try:
        yield pool
    finally:
        for actor in pool:
            ray.kill(actor)


def _work(actor: ActorHandle, share: Any) -> ray.ObjectRef:
    return actor.work.remote(share)


def share_out(
    pool: Sequence[ActorHandle],
    shares: Iterable[ShareT],
    what: str,
    give: Callable[[ActorHandle, ShareT], ray.ObjectRef] = _work,
    busy: ray.ObjectRef | None = None,
) -> Iterator[tuple[ShareT, Any]]:
    """Give every actor a share as soon as it is free, until all are done; each answer comes with its share.

    Only a lost share is run again: an actor that may come back is asked whether
    it has, a dead one is forgotten.

    Args:
        pool: actors with a method `ready`.
        what: what the actors do, for errors: "score", "evaluation".
        give: starts the work on a share; the actors' own method `work` if not given.
        busy: the answer that the first actor is at work on; it takes shares when that is there.

    Raises:
        WorkError: all actors are lost.
    """
    todo = deque(shares)
    left = len(todo)
    idle: list[ActorHandle] = []
    pending: dict[ray.ObjectRef, tuple[ActorHandle, list[ShareT]]] = {
        (busy if busy and position == 0 else actor.ready.remote()): (actor, [])
        for position, actor in enumerate(pool)
    }
    while left:
        while idle and todo:
            actor, share = idle.pop(), todo.popleft()
            pending[give(actor, share)] = (actor, [share])
        if not pending:
            raise WorkError(f"all {len(pool)} {what} actors were lost; see the run's logs, then use --resume")
        (done,), _ = ray.wait(list(pending), num_returns=1)
        actor, given = pending.pop(done)
        try:
            answer = result_of(done)
        except RayActorError as error:
            if given:
                log.warning("a %s actor was lost (%s); its share goes to another", what, error)
                todo.extend(given)
            if isinstance(error, ActorUnavailableError):
                # Its process is gone and Ray has not noticed yet: asked at once, it would say the same.
                time.sleep(RETRY_S)
            if given or isinstance(error, ActorUnavailableError):
                pending[actor.ready.remote()] = (actor, [])
            continue
        idle.append(actor)
        for share in given:
            left -= 1
            yield share, answer


def conducted(work: Callable[..., ResultT], *arguments: Any, **named: Any) -> ResultT:
    """Run `work`, which has others compute, in a process of its own; again elsewhere if that is lost.

    A trial lives as long as its trajectory and so only waits: it would else hold the
    libraries of every stage.
    """
    task = ray.remote(work).options(**placement(0, 0), max_retries=3)
    result: ResultT = result_of(task.remote(*arguments, **named))
    return result


def export_on_ray(spec: ExportSpec, uri: str, *, cpus: float, gpus: float) -> ExportResult:
    """Export as a task of its own, run again elsewhere if its machine is lost."""
    task = ray.remote(_export).options(**placement(cpus, gpus), max_retries=3)
    return result_of(task.remote(spec, uri))


def _export(spec: ExportSpec, uri: str) -> ExportResult:
    from actors.models.exporting.export import export_model

    return export_model(spec, uri)
