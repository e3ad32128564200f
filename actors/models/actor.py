"""Placing work on a Ray cluster: what scoring, evaluation and export have in common."""

from typing import Any

import ray
from ray.exceptions import RayTaskError

from actors.contracts import ExportResult, ExportSpec
from actors.errors import IterabreError, WorkError
from actors.models.export import export_model


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
    """The value, with an error meant for the user raised as itself rather than wrapped by Ray."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, IterabreError):
            raise error.cause from None
        raise


def export_on_ray(spec: ExportSpec, uri: str, *, cpus: float, gpus: float) -> ExportResult:
    """Export as a task of its own, run again elsewhere if its machine is lost."""
    task = ray.remote(export_model).options(**placement(cpus, gpus), max_retries=3)
    return result_of(task.remote(spec, uri))
