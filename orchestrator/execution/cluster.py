"""The Ray cluster that a campaign runs on: connection, capacity, what its workers print."""

import logging
import math
import os
import textwrap
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import psutil
import ray
from ray._private import ray_constants, services
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray._private.state import state
from ray._raylet import GcsClient
from ray.core.generated import gcs_pb2
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.artifacts import DRIVER_DIRECTORY, PATIENCE_VARIABLE, patience_s
from actors.contracts import ActorPoolSpec, EvaluationResult, EvaluationSpec
from actors.evaluation.ray import evaluate_all_on_ray
from actors.plugins import environment
from orchestrator.config import ExecutionConfig
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
    without_variables_of_job,
)
from orchestrator.execution.task_scoring import EvaluateAll
from orchestrator.scheduling.packing import Node, Packing, with_node_types
from orchestrator.scheduling.resources import GB, ResourceBundle, ResourceRequest
from orchestrator.scheduling.snapshots import NodeReport, Snapshots, node_of

log = logging.getLogger(__name__)

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

OUT_OF_MEMORY = {"RAY_task_oom_retries": "1"}
"""A task that Ray ended because its node was short of memory would else be tried again for ever."""

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
    environment_of_workers |= {PATIENCE_VARIABLE: str(patience_s()), **OUT_OF_MEMORY}
    try:
        ray.init(
            address=found,
            include_dashboard=False if own else None,
            logging_level=logging.ERROR,
            namespace=f"{NAMESPACE}{uuid.uuid4().hex}",
            runtime_env={"env_vars": without_variables_of_job(environment_of_workers)},
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
    import grpc  # a trial's process, which loads this module, need not pay for it
    from ray._private.grpc_utils import init_grpc_channel

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

NAMESPACE = "iterabre-"
"""What Ray's namespaces of our drivers begin with. Each has one of its own, as Ray gives to any driver."""

LEFT_HELPER = "PlacementGroupCleaner"
"""The class of Ray Train's that can outlive a killed driver."""

SNAPSHOT_S = 1.0
"""How often the nodes of the cluster are looked at."""

CLEANING_S = 10.0
"""How often what lost trainings left is removed."""

MANY_NODES = 100
"""Nodes of a type that an autoscaler starts without a limit."""

TRIAL_BYTES = 0.5e9
"""What the process of a trial takes on the head, with what a Ray Train job adds."""


def node_reports(own_job: bool = True) -> list[NodeReport]:
    """Return what Ray reports of the nodes that are up and stay; with what this job's actors hold there."""
    accessor = state._connect_and_get_accessor()
    ours: dict[str, Counter[str]] = defaultdict(Counter)
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    for actor_state in ("ALIVE", "PENDING_CREATION") if own_job else ():
        for stored in accessor.get_actor_table(job, actor_state):
            actor = gcs_pb2.ActorTableData.FromString(stored)
            if actor.pid:  # else it waits for a place, and holds nothing
                ours[actor.address.node_id.hex()].update(_held(actor.required_resources))
    available, leaving = state.available_resources_per_node(), state.get_draining_nodes()
    return [
        NodeReport(
            node_id=node["NodeID"],
            name=node["NodeManagerHostname"],
            resources=node["Resources"],
            available=available.get(node["NodeID"], node["Resources"]),
            ours=ours[node["NodeID"]],
            labels=node["Labels"],
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def _held(resources: Mapping[str, float]) -> dict[str, float]:
    """Return what an actor holds of its node; one in a placement group holds that of its bundle.

    There it has each resource as CPU_group_ID, and perhaps as CPU_group_INDEX_ID once more.
    """
    held: dict[str, float] = {}
    for name, amount in resources.items():
        kind, _, place = name.partition("_group_")
        if "_" not in place:
            held[kind] = amount
    return held


def node_types(execution: ExecutionConfig) -> list[tuple[Node, int]]:
    """Return the node types that the autoscaler may start, and how many: as configured, or as it reports."""
    given = [
        (
            Node(
                f"type {number}",
                each.cpus,
                each.gpus,
                math.inf if each.memory_gb is None else each.memory_gb * GB,
                accelerators=frozenset({each.accelerator} if each.accelerator else ()),
                labels=each.labels,
                is_up=False,
            ),
            each.nodes,
        )
        for number, each in enumerate(execution.node_types, 1)
    ]
    config = None if given else state.get_cluster_config()
    for group in config.node_group_configs if config else ():
        like = node_of(NodeReport(group.name, group.name, dict(group.resources), {}))
        count = MANY_NODES if group.max_count < 0 else group.max_count
        given.append((replace(like, memory_bytes=like.memory_bytes or math.inf, is_up=False), count))
    return given


def cluster_nodes(execution: ExecutionConfig | None = None) -> list[Node]:
    """Return the nodes of the connected cluster, with those that its autoscaler may start, as if all idle."""
    types = node_types(execution or ExecutionConfig())
    return with_node_types([node_of(report) for report in node_reports(own_job=False)], types)


def head_memory_bytes() -> float:
    """Return the memory that Ray counts on the head."""
    return max(
        (node["Resources"].get("memory", 0) for node in ray.nodes() if HEAD in node["Resources"]), default=0
    )


def evaluate_on_cluster(address: str | None, pool: ActorPoolSpec) -> EvaluateAll:
    """Return what evaluates many models on actors of the cluster at `address`, or of this machine if None.

    It raises ClusterTooSmallError if no node can ever hold an actor.
    """

    def evaluate_all(specs: Sequence[EvaluationSpec]) -> Iterator[tuple[int, EvaluationResult]]:
        request = ResourceRequest(ResourceBundle(pool.cpus, pool.gpus))
        with cluster(address):
            if not Packing(cluster_nodes(), empty=True).fits(request):
                raise ClusterTooSmallError(
                    f"an actor needs {pool.cpus:g} CPU and {pool.gpus:g} GPU, and no node of the cluster has "
                    "that; lower --cpus and --gpus"
                )
            yield from evaluate_all_on_ray(specs, pool)

    return evaluate_all


def nodes_at(address: str | None) -> list[Node]:
    """Return the nodes of the cluster at `address`, with those that its autoscaler may start.

    Raises:
        RequestError: none can be joined there.
    """
    with cluster(address):
        return cluster_nodes()


def end_helpers_of_dead_drivers() -> None:
    """End the process that Ray Train leaves for ever if a driver of ours is killed while a training starts.

    Those of other users' jobs are left alone: ours are known by their namespace.
    The helper outlives its training, in order to clean up after it; one that had not yet received what
    to watch when all others ended waits for that.
    """
    accessor = state._connect_and_get_accessor()
    stored = accessor.get_job_table(skip_submission_job_info_field=True, skip_is_running_tasks_field=True)
    jobs = [gcs_pb2.JobTableData.FromString(job) for job in stored]
    ours = [job for job in jobs if job.config.ray_namespace.startswith(NAMESPACE)]
    dead = {job.job_id.hex() for job in ours if job.is_dead}
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


def free_places_of_dead_trainings() -> None:
    """Remove placement groups of this job that were made by actors which are dead: controllers of Ray Train.

    Ray keeps them until the job ends. Ray Train has a process to remove them, which fails where it finds two
    clusters on a machine; a trajectory that lost its process would then wait for its own place for ever.
    """
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id()).binary()
    for stored in state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(stored)
        # Of a group that the driver made, Ray says that its actor is dead, too.
        of_dead = group.creator_actor_dead and not ray.ActorID(group.creator_actor_id).is_nil()
        is_there = group.state != gcs_pb2.PlacementGroupTableData.REMOVED and not group.is_detached
        if of_dead and is_there and group.creator_job_id == job:
            log.warning("the place of a training whose controller is lost is freed")
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


class ClusterNodes:
    """The nodes of the connected cluster with the room that there is, looked at every second.

    Where it is first called, a thread begins to look: a coordinator need not wait for Ray's answers.
    It also frees, now and then, what lost trainings hold.
    """

    def __init__(self, types: Sequence[tuple[Node, int]]):
        self._types = types
        self._snapshots = Snapshots()
        self._nodes: list[Node] | None = None
        self._looking = threading.Lock()

    def __reduce__(self) -> tuple[type["ClusterNodes"], tuple[Sequence[tuple[Node, int]]]]:
        return ClusterNodes, (self._types,)

    def __call__(self) -> Sequence[Node]:
        with self._looking:
            if self._nodes is None:
                self._look()
                threading.Thread(target=self._keep_looking, name="nodes", daemon=True).start()
        assert self._nodes is not None
        return self._nodes

    def _look(self) -> None:
        self._nodes = with_node_types(self._snapshots.add(node_reports()), self._types)

    def _keep_looking(self) -> None:
        cleaned_at = time.monotonic()
        while ray.is_initialized():
            time.sleep(SNAPSHOT_S)
            try:
                if time.monotonic() - cleaned_at > CLEANING_S:
                    cleaned_at = time.monotonic()
                    free_places_of_dead_trainings()
                self._look()
            except Exception as error:  # the head may be away for a moment
                log.warning("the nodes of the cluster could not be looked at, trying again: %s", error)


def trajectories_at_a_time(execution: ExecutionConfig, keep_busy: int, head_bytes: float) -> int:
    """Return how many are under way: as many as the config says, or else as keep the cluster busy.

    Each has a process on the head, which may take half of the memory there.
    """
    if execution.max_concurrent_trajectories is not None:
        return execution.max_concurrent_trajectories
    return max(1, min(keep_busy, int(head_bytes / 2 / TRIAL_BYTES)))
