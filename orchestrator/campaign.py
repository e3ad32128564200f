"""Runs a campaign: one Ray Tune trial a trajectory, or one trajectory after another in this process."""

import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray._private.ray_logging import global_worker_stdstream_dispatcher

from actors.contracts import EvaluationResult, EvaluationSpec
from actors.evaluation import check_task_data
from actors.evaluation.actor import evaluate_all_on_ray
from orchestrator.backends import BACKENDS
from orchestrator.candidates import EvaluateAll
from orchestrator.config import CampaignConfig, ExecutionConfig
from orchestrator.errors import ClusterTooSmallError, IterabreError
from orchestrator.plan import CampaignPlan, TrajectoryPlan
from orchestrator.progress import Board, RemoteReport, Report, live_view
from orchestrator.run_file import check_run, open_run
from orchestrator.stages import StoredStages
from orchestrator.store import Store
from orchestrator.trajectory import run_trajectory

log = logging.getLogger(__name__)

HEAD = "node:__internal_head__"
TRIAL_PLACE = tune.PlacementGroupFactory([{HEAD: 0.001}])
"""A trial only waits for its stages: it takes no CPU, and lives on the head, never a spot machine."""

LOST_TRIAL_RETRIES = 3
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class Outcome:
    """How a campaign ended: the reason of every trajectory that failed."""

    failures: Mapping[str, str]


def run_campaign(
    config: CampaignConfig, plan: CampaignPlan, store: Store, *, resume: bool, address: str | None = None
) -> Outcome:
    """Run every trajectory of `plan` that is not finished in `store`.

    A trajectory that fails is recorded with its reason and does not stop the others.
    Nothing is written before all checks have passed.

    Args:
        resume: go on with the run that `store` holds.
        address: a Ray cluster to join; RAY_ADDRESS or a cluster of this machine's own if None.

    Raises:
        RequestError: `store` cannot be written or holds another run, or data of a task are missing.
        ClusterTooSmallError: the cluster can never give what `config.execution` asks for.
    """
    execution = config.execution
    check_run(store, config.model_dump(mode="json"), resume)
    evaluation = plan.trajectories[0].evaluation
    check_task_data(evaluation.tasks, evaluation.include_path, evaluation.num_fewshot)
    store.check_writable(plan.needed_bytes())
    os.environ.update(QUIET)
    if execution.backend == "local":
        with _run_log(store, config), _stopping_on_sigterm():
            return _run_in_this_process(execution, plan, store)
    with _cluster(address):
        capacity = cluster_capacity()
        check_resources(execution, capacity)
        overlap = execution.overlap_evaluation and has_room_for_both(execution, capacity)
        workers_log = store.logs_dir / "workers.log"
        with _run_log(store, config), _workers_output_to(workers_log), _stopping_on_sigterm():
            return _run_trials(execution, plan, store, overlap)


def _run_in_this_process(execution: ExecutionConfig, plan: CampaignPlan, store: Store) -> Outcome:
    board = Board()
    failures: dict[str, str] = {}
    with live_view(board.snapshot):
        for trajectory in plan.trajectories:
            failure = _follow(trajectory, execution, store, board.post)
            failures |= {trajectory.id: failure} if failure else {}
    return Outcome(failures)


def _run_trials(execution: ExecutionConfig, plan: CampaignPlan, store: Store, overlap: bool) -> Outcome:
    """Trials begun again find their finished stages in the store, so Tune need not restore anything."""
    board = ray.remote(num_cpus=0)(Board).remote()
    trainable = tune.with_parameters(
        _trial, plan=plan, execution=execution, store=store, board=board, overlap=overlap
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, TRIAL_PLACE),
        param_space={"trajectory": tune.grid_search([trajectory.id for trajectory in plan.trajectories])},
        tune_config=tune.TuneConfig(max_concurrent_trials=execution.max_concurrent_trajectories),
        run_config=tune.RunConfig(
            name=f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}",
            storage_path=store.tune_uri,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=LOST_TRIAL_RETRIES),
        ),
    )
    with live_view(lambda: ray.get(board.snapshot.remote())):
        results = tuner.fit()
    failures: dict[str, str] = {}
    for result in results:
        reason = _last_line(result.error) if result.error else (result.metrics or {}).get("failure")
        failures |= {result.config["trajectory"]: reason} if reason else {}
    return Outcome(failures)


def _trial(
    parameters: Mapping[str, str],
    plan: CampaignPlan,
    execution: ExecutionConfig,
    store: Store,
    board: Any,
    overlap: bool,
) -> None:
    """A Tune trial: one trajectory. Lost machines raise and are retried; wrong requests are reported."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    trajectory = plan.find(parameters["trajectory"])
    failure = _follow(trajectory, execution, store, RemoteReport(board), overlap)
    tune.report({"failure": failure or ""})


def _last_line(error: BaseException) -> str:
    """What went wrong, without the trace of the processes it went through; the logs have that."""
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _follow(
    trajectory: TrajectoryPlan,
    execution: ExecutionConfig,
    store: Store,
    report: Report,
    overlap: bool = False,
) -> str | None:
    """Run one trajectory; the reason if it failed in a way that trying again cannot mend."""
    backend = BACKENDS[execution.backend](execution, store)
    stages = StoredStages(trajectory, store, backend, report, overlap)
    try:
        run_trajectory(trajectory, stages)
    except IterabreError as error:
        log.error("%s failed: %s", trajectory.id, error)
        report(replace(stages.activity, stage="failed", finished=True))
        return str(error)
    report(replace(stages.activity, finished=True))
    return None


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    # "local" rather than None: Ray would else join, or wait for, a node that `ray start` once left here.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    ray.init(
        address=address,
        include_dashboard=False if address == "local" else None,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": QUIET},
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _run_log(store: Store, config: CampaignConfig) -> Iterator[None]:
    """Open the run and keep this process's log in it."""
    open_run(store, config.model_dump(mode="json"), resume=True)
    store.logs_dir.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(store.logs_dir / "driver.log")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """End as on Ctrl-C when the job is stopped; entered after Ray installed its own handler, which aborts."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _workers_output_to(file: Path) -> Iterator[None]:
    """Send what workers print to `file` instead of this terminal."""

    def write(data: Mapping[str, Any]) -> None:
        if data.get("pid") == "autoscaler":
            return
        name = data.get("actor_name") or data.get("task_name") or "worker"
        who = f"{name} pid={data.get('pid')} {data.get('ip')}"
        stream.writelines(f"({who}) {line}\n" for line in data.get("lines", []) if line.strip())
        stream.flush()

    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    with file.open("a", encoding="utf-8") as stream:
        global_worker_stdstream_dispatcher.add_handler("iterabre_log", write)
        try:
            yield
        finally:
            global_worker_stdstream_dispatcher.remove_handler("iterabre_log")


@dataclass(frozen=True)
class Capacity:
    """What a cluster has or can grow to: in all, and on its largest node."""

    cpus: float
    gpus: float
    node_cpus: float
    node_gpus: float
    can_grow: bool = False


def cluster_capacity() -> Capacity:
    """The capacity of the connected cluster, as far as its autoscaler tells."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    growth = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return Capacity(
        cpus=max(growth.get("CPU", 0), sum(node.get("CPU", 0) for node in nodes)),
        gpus=max(growth.get("GPU", 0), sum(node.get("GPU", 0) for node in nodes)),
        node_cpus=max(node.get("CPU", 0) for node in nodes),
        node_gpus=max(node.get("GPU", 0) for node in nodes),
        can_grow=bool(growth),
    )


def evaluate_on_cluster(
    address: str | None, *, actors: int, cpus: float, gpus: float, start_timeout_s: float = 600.0
) -> EvaluateAll:
    """Evaluates many models on actors of the cluster at `address`, or of this machine if None."""

    def evaluate_all(specs: Sequence[EvaluationSpec]) -> Iterator[tuple[int, EvaluationResult]]:
        with _cluster(address):
            yield from evaluate_all_on_ray(
                specs, actors=actors, cpus=cpus, gpus=gpus, start_timeout_s=start_timeout_s
            )

    return evaluate_all


def capacity_at(address: str) -> Capacity:
    """The capacity of the cluster at `address`.

    Raises:
        ConnectionError: none answers there.
    """
    with _cluster(address):
        return cluster_capacity()


def check_resources(execution: ExecutionConfig, capacity: Capacity) -> None:
    """Refuse what the cluster can never give, rather than wait for it for ever.

    Raises:
        ClusterTooSmallError: says what is needed, and what there is.
    """
    training = execution.training
    asked = {
        "scoring": (1, execution.scoring.cpus, execution.scoring.gpus),
        "generation": (1, execution.generation.cpus, execution.generation.gpus),
        "training": (training.workers, training.cpus, training.gpus),
        "evaluation": (1, execution.evaluation.cpus, execution.evaluation.gpus),
    }
    for section, (count, cpus, gpus) in asked.items():
        for kind, each, in_all, on_node in (
            ("CPU", cpus, capacity.cpus, capacity.node_cpus),
            ("GPU", gpus, capacity.gpus, capacity.node_gpus),
        ):
            if count * each > in_all or (each > on_node and not capacity.can_grow):
                raise ClusterTooSmallError(
                    f"execution.{section} needs {count * each:g} {kind} ({count} x {each:g}), but the "
                    f"cluster has {in_all:g} {kind}, {on_node:g} on its largest node; "
                    f"lower execution.{section} or use a larger cluster"
                )


def has_room_for_both(execution: ExecutionConfig, capacity: Capacity) -> bool:
    """Whether every trajectory can be evaluated while its next iteration is scored and trained.

    Otherwise what is asked for later would wait for an evaluation to end, up to its time-out.
    """
    evaluation, scoring, training = execution.evaluation, execution.scoring, execution.training
    cpus = evaluation.actors * evaluation.cpus + max(scoring.cpus, training.workers * training.cpus)
    gpus = evaluation.actors * evaluation.gpus + max(scoring.gpus, training.workers * training.gpus)
    at_a_time = execution.max_concurrent_trajectories
    return at_a_time * cpus <= capacity.cpus and at_a_time * gpus <= capacity.gpus
