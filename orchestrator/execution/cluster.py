"""The Ray cluster that a campaign runs on: connection, capacity, what its workers print."""

import logging
import math
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import grpc
import psutil
import ray
from ray._private import ray_constants, services
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray._raylet import GcsClient
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.artifacts import DRIVER_DIRECTORY
from actors.contracts import ActorPoolSpec, EvaluationResult, EvaluationSpec
from actors.evaluation.ray import evaluate_all_on_ray
from actors.plugins import environment
from orchestrator.config import ClusterMaximumConfig, ExecutionConfig
from orchestrator.errors import ClusterTooSmallError, RequestError
from orchestrator.execution.connection import (
    CONNECT_TIMEOUT_S,
    LOCAL,
    check_answers,
    check_open_files,
    check_token_file,
    cluster_address,
    ray_temp_dir,
    unreachable,
)
from orchestrator.execution.task_scoring import EvaluateAll
from orchestrator.scheduling.admission import AdmissionController
from orchestrator.scheduling.resources import ResourceBundle, stage_resources

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A trial's last report says how it ended and compares nothing.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


LAST_LINES_S = 0.5
"""Longer than what a worker prints takes to the driver."""

CREDENTIALS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
"""What Tune would hand on to trials in their runtime environment: lists of processes show that, and the
dashboard. Every node has credentials of its own."""


def find_cluster(address: str | None) -> str:
    """Return HOST:PORT of the cluster at `address`, which answers there, or `local` for one of our own.

    Raises:
        RequestError: the address is none, no cluster answers there (Ray would try for minutes), or Ray
            could not start here.
    """
    # "local" rather than None: Ray would else join, or wait for, a node that `ray start` once left here.
    wanted = cluster_address(address)
    check_token_file()
    if wanted == LOCAL:
        check_open_files()
        ray_temp_dir()
        return LOCAL
    found = wanted
    try:
        found = services.canonicalize_bootstrap_address(wanted) or wanted
        check_answers(found)
        _check_speaks_grpc(found)
        GcsClient(address=found).get_all_node_info(timeout=CONNECT_TIMEOUT_S)
    except Exception as error:  # Ray has many, and none of its own for this
        shown = wanted if found == wanted else f"{wanted} ({found})"
        raise unreachable(shown, _in_one_line(error)) from error
    return found


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to the cluster at `address`, or to one of this process's own.

    Raises:
        RequestError: as `find_cluster`, or that cluster cannot be joined.
    """
    found = find_cluster(address)
    own = found == LOCAL
    ENV_VARS_TO_PROPAGATE.difference_update(CREDENTIALS)
    environment_of_workers = QUIET | environment() | {DRIVER_DIRECTORY: os.getcwd()}
    try:
        ray.init(
            address=found,
            include_dashboard=False if own else None,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": environment_of_workers},
            _temp_dir=ray_temp_dir() if own else None,
        )
    except Exception as error:
        ray.shutdown()
        if own:
            raise RequestError(f"Ray cannot start on this machine: {_in_one_line(error)}") from error
        raise unreachable(found, _in_one_line(error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_speaks_grpc(address: str) -> None:
    """Check that what listens at HOST:PORT could be a Ray head; Ray's own client takes 40 s to find out.

    Raises:
        ConnectionError: it could not.
    """
    with init_grpc_channel(address, ray_constants.GLOBAL_GRPC_OPTIONS) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            raise ConnectionError("what listens there is no Ray head (its port is 6379 by default)") from None


def _in_one_line(error: Exception) -> str:
    """Return what Ray says, without the end of what is too long for a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return textwrap.shorten(text, width=400, placeholder=" …")


@contextmanager
def workers_output_to(write: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Give what workers print to `write` instead of this terminal: lines, and the process they are from."""

    def write_workers(data: Mapping[str, Any]) -> None:
        if data.get("pid") != "autoscaler":
            write(data)

    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    global_worker_stdstream_dispatcher.add_handler("iterabre_log", write_workers)
    try:
        yield
    finally:
        # The last lines of a stage are under way.
        time.sleep(LAST_LINES_S)
        global_worker_stdstream_dispatcher.remove_handler("iterabre_log")


HEAD = "node:__internal_head__"
"""The resource that marks the head node."""

LEFT_HELPER = "PlacementGroupCleaner"
"""The class of Ray Train's that can outlive a killed driver."""

CAPACITY_S = 5.0
"""How long a look at the cluster's capacity holds."""

TRIAL_BYTES = 0.5e9
"""What the process of a trial takes on the head, with what a Ray Train job adds."""


@dataclass(frozen=True)
class Capacity:
    """What a cluster has or can grow to: in all, and on its largest node; and the head's memory."""

    cpus: float
    gpus: float
    node_cpus: float
    node_gpus: float
    can_grow: bool = False
    head_bytes: float = 0.0


def cluster_capacity() -> Capacity:
    """Return the capacity of the connected cluster, as far as its autoscaler reports it."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    growth = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return Capacity(
        cpus=max(growth.get("CPU", 0), sum(node.get("CPU", 0) for node in nodes)),
        gpus=max(growth.get("GPU", 0), sum(node.get("GPU", 0) for node in nodes)),
        node_cpus=max(node.get("CPU", 0) for node in nodes),
        node_gpus=max(node.get("GPU", 0) for node in nodes),
        can_grow=bool(growth),
        head_bytes=max(node.get("memory", 0) for node in nodes if HEAD in node),
    )


def with_autoscaling(capacity: Capacity, maximum: ClusterMaximumConfig | None) -> Capacity:
    """Return the capacity of the cluster once it is scaled up to `maximum`, or as it is if that is None.

    Ray's own autoscaler does not report what it may start, so a cluster whose workers start
    from zero has nothing to show before the first request.
    """
    if maximum is None:
        return capacity
    return replace(
        capacity,
        cpus=max(capacity.cpus, maximum.nodes * maximum.cpus),
        gpus=max(capacity.gpus, maximum.nodes * maximum.gpus),
        node_cpus=max(capacity.node_cpus, maximum.cpus),
        node_gpus=max(capacity.node_gpus, maximum.gpus),
    )


def evaluate_on_cluster(address: str | None, pool: ActorPoolSpec) -> EvaluateAll:
    """Return what evaluates many models on actors of the cluster at `address`, or of this machine if None."""

    def evaluate_all(specs: Sequence[EvaluationSpec]) -> Iterator[tuple[int, EvaluationResult]]:
        with cluster(address):
            yield from evaluate_all_on_ray(specs, pool)

    return evaluate_all


def capacity_at(address: str | None) -> Capacity:
    """Return the capacity of the cluster at `address`.

    Raises:
        RequestError: none can be joined there.
    """
    with cluster(address):
        return cluster_capacity()


def check_resources(execution: ExecutionConfig, capacity: Capacity) -> None:
    """Refuse what the cluster can never give, rather than wait for it for ever.

    Raises:
        ClusterTooSmallError: says what is needed, and what there is.
    """
    requests = stage_resources(execution)
    sections = {"scoring": "score", "generation": "generate", "training": "recover", "evaluation": "evaluate"}
    for section, stage in sections.items():
        least, count = requests[stage].min, execution.training.workers if stage == "recover" else 1
        cpus, gpus = least.cpus / count, least.gpus / count
        for kind, each, in_all, on_node in (
            ("CPU", cpus, capacity.cpus, capacity.node_cpus),
            ("GPU", gpus, capacity.gpus, capacity.node_gpus),
        ):
            if count * each > in_all or (each > on_node and not capacity.can_grow):
                raise ClusterTooSmallError(
                    f"execution.{section} needs {count * each:g} {kind} ({count} x {each:g}), but the "
                    f"cluster has {in_all:g} {kind}, {on_node:g} on its largest node; "
                    f"lower execution.{section}, use a larger cluster, or say in "
                    "execution.cluster_maximum what an autoscaler makes of this one"
                )


def end_helpers_of_dead_drivers() -> None:
    """End the process that Ray Train leaves for ever if its driver is killed while a training starts.

    The helper outlives its training, in order to clean up after it; one that had not yet received what
    to watch when all others ended waits for that.
    """
    dead = {job["JobID"] for job in ray._private.state.jobs() if job["IsDead"]}
    for actor in ray._private.state.actors().values():
        left = actor["State"] == "ALIVE" and actor["JobID"] in dead
        if left and actor["ActorClassName"] == LEFT_HELPER:
            there = NodeAffinitySchedulingStrategy(actor["Address"]["NodeID"], soft=False)
            end = ray.remote(_end_process).options(num_cpus=0, scheduling_strategy=there)
            ray.get(end.remote(actor["Pid"], f"ray::{LEFT_HELPER}"))


def _end_process(pid: int, title: str) -> None:
    """End that process of this machine, if it still is what it was."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if " ".join(process.cmdline()).startswith(title):
            process.kill()


class ClusterResources:
    """What the connected cluster has or can grow to, looked up anew every few seconds: nodes come and go."""

    def __init__(self, maximum: ClusterMaximumConfig | None):
        self._maximum = maximum
        self._looked_up_at = -math.inf
        self._resources = ResourceBundle(0, 0)

    def __call__(self) -> ResourceBundle:
        if time.monotonic() - self._looked_up_at > CAPACITY_S:
            capacity = with_autoscaling(cluster_capacity(), self._maximum)
            self._resources = ResourceBundle(capacity.cpus, capacity.gpus)
            self._looked_up_at = time.monotonic()
        return self._resources


def trajectories_at_a_time(
    execution: ExecutionConfig, admission: AdmissionController, head_bytes: float
) -> int:
    """Return how many are under way: as many as the config says, or else as keep the cluster busy.

    Each has a process on the head, which may take half of the memory there.
    """
    if execution.max_concurrent_trajectories is not None:
        return execution.max_concurrent_trajectories
    return max(1, min(admission.concurrent_trajectories(), int(head_bytes / 2 / TRIAL_BYTES)))
