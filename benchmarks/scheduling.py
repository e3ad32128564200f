"""A campaign of many trajectories whose stages only sleep, on made-up GPUs, against a plain grid of Ray Tune.

    python -m benchmarks.scheduling [--trajectories 200] [--gpus 64] [--minutes 8]

Stages sleep for times that the cost model gives for a 7B model on A100s, scaled so that
the campaign's distinct stages keep the GPUs busy for `--minutes`, with a log-normal spread.
All else is real: Tune, the coordinator, the store, the ledger. The plain grid is one trial a
trajectory that does the same stages in a row, shares none, and holds for its whole life as
many GPUs as its widest stage needs, as a Tune trial does.

Reported for both: time from the first stage to the last, and the share of the GPU time in which a
stage was at work; for ours also that share while as many trajectories were under way as are meant
to be, which leaves out that this machine starts their processes two at a time. Before that, a few
trajectories that never wait for a place tell the time from the end of a stage to the next one's start
(key, store, ledger, coordinator). A sleeping stage is a process on this machine, which a real one
would not be: those are kept, and start before the clock does.
"""

import argparse
import itertools
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import tune

from actors.contracts import ModelInfo, ModelSpec
from orchestrator.config import CampaignConfig, parse_config
from orchestrator.execution.campaign import limits_of
from orchestrator.execution.dry_run import campaign_stages, planned_stages
from orchestrator.execution.tune import run_trials
from orchestrator.planning.cost_model import (
    MACHINES,
    StageCost,
    block_flops,
    seconds,
    training_block_flops,
)
from orchestrator.planning.plan import CampaignPlan
from orchestrator.planning.planner import build_plan
from orchestrator.planning.stages import count_stages, distinct_stages
from orchestrator.scheduling.admission import AdmissionController
from orchestrator.scheduling.packing import Node
from orchestrator.scheduling.resources import ResourceBundle, ResourceRequest
from orchestrator.storage.stage_store import Store
from tests.support.simulated import Simulation
from tests.support.tiny_campaign import tiny_campaign

DEVICE = "made_up_gpu"
DEVICES = {"score": 2, "recover": 4, "evaluate": 1, "export": 1}
SPREAD = 0.2
GPUS_OF_A_NODE = 8
FEW = 8
"""Trajectories that tell the time between stages: no more than find their resources free."""

OWN = {("recover", "evaluate"), ("evaluate", "export")}
LLAMA_7B = ModelInfo(
    ModelSpec("7b", "bfloat16"),
    "llama",
    32,
    6_738_415_616,
    32_000,
    "",
    (202_383_360,) * 32,
    4096,
    4096,
    32,
    75_000,
)


@dataclass(frozen=True)
class Work:
    """One stage as it was computed: when it was asked for and done, and the seconds it slept."""

    kind: str
    process: str
    asked: float
    done: float
    took: float


def stage_times() -> dict[str, float]:
    """Seconds of each kind of stage, of a 7B model on A100s with the paper's settings."""
    layers, tokens = LLAMA_7B.num_layers, 2.5e6
    flops = {
        "score": layers * (layers + 1) / 2 * block_flops(LLAMA_7B, 10 * 25, 25),
        "recover": layers
        * (training_block_flops(LLAMA_7B, tokens, 512, 32) + block_flops(LLAMA_7B, tokens, 512)),
        "evaluate": layers * block_flops(LLAMA_7B, 4e6, 100),
        "export": 0.0,
    }
    weights = 2.0 * LLAMA_7B.num_parameters
    a100 = MACHINES["A100-80G"]
    return {
        kind: seconds(StageCost(flops[kind], weights), kind, a100, DEVICES[kind], "bfloat16", 0.35)
        for kind in DEVICES
    }


def campaign(directory: Path, trajectories: int, overlap: bool = True) -> CampaignConfig:
    """Trajectories that differ in learning rate and seed, 4 → 3 → 2 layers."""
    raw = tiny_campaign(directory)
    seeds = 4
    rates = [1e-4 * (1 + i) for i in range(max(1, trajectories // seeds))]
    raw["methods"][0]["recovery"]["learning_rate"] = {"grid": rates}
    raw["seeds"] = list(range(seeds))
    raw["execution"] = {"backend": "ray", "overlap_evaluation": overlap}
    return parse_config(raw, "benchmark")


def start_processes(count: int) -> None:
    """Have so many processes for stages to sleep in."""
    together = ray.remote(num_cpus=0, resources={DEVICE: 1})(lambda: time.sleep(15))
    ray.get([together.remote() for _ in range(count)])


def read_notes(notes: Path) -> list[Work]:
    """What was computed."""
    return [
        Work(file.name.split("-")[0], process, float(asked), float(done), float(took))
        for file in notes.glob("*.txt")
        for process, asked, done, took in [file.read_text().split()]
    ]


def whole(work: list[Work]) -> tuple[float, float]:
    """From the first request to the last end."""
    return min(w.asked for w in work), max(w.done for w in work)


def full(work: list[Work]) -> tuple[float, float]:
    """From when the last process of a trial came to when the first one had nothing more to do."""
    by_process = grouped(work).values()
    return max(one[0].asked for one in by_process), min(max(w.done for w in one) for one in by_process)


def utilisation(work: list[Work], gpus: int, window: tuple[float, float]) -> float:
    """The share of the GPU time in the window that was spent at work."""
    start, end = window
    at_work = (DEVICES[w.kind] * max(0, min(end, w.done) - max(start, w.done - w.took)) for w in work)
    return sum(at_work) / (gpus * (end - start))


def grouped(work: list[Work]) -> dict[str, list[Work]]:
    """By process, in the order in which it asked."""
    by_process: dict[str, list[Work]] = defaultdict(list)
    for w in sorted(work, key=lambda w: w.asked):
        by_process[w.process].append(w)
    return by_process


def overheads(work: list[Work]) -> list[float]:
    """Seconds from the end of each stage to the next request of the same process.

    Between a recovery and the next export or scoring: what no other trajectory needs, so that
    nobody waits for another.
    """
    return [
        after.asked - before.done
        for one in grouped(work).values()
        for before, after in itertools.pairwise(one)
        if (before.kind, after.kind) in OWN
    ]


def run_ours(
    config: CampaignConfig,
    plan: CampaignPlan,
    times: Mapping[str, float],
    notes: Path,
    admission: AdmissionController,
    concurrent: int | None = None,
) -> list[Work]:
    """The campaign's stages as they were computed."""
    backend = Simulation(times, notes, DEVICE, DEVICES, spread=SPREAD)
    at_a_time = concurrent or len(plan.trajectories)
    store = Store(str(notes / "run"))
    outcome = run_trials(config, plan, store, limits_of(config), at_a_time, admission, backend)
    assert not outcome.failures, outcome.failures
    return read_notes(notes)


def plain_trial(
    parameters: Mapping[str, Any], times: Mapping[str, float], kinds: list[str], notes: str
) -> None:
    """A trajectory's stages in a row, on the GPUs that the trial holds."""
    simulation = Simulation(times, Path(notes), spread=SPREAD)
    backend = simulation(None, None)  # type: ignore[arg-type]
    for number, kind in enumerate(kinds):
        backend._work(kind, (parameters["trajectory"], number))
    tune.report({"done": True})


def run_plain(plan: CampaignPlan, times: Mapping[str, float], notes: Path, scratch: Path) -> None:
    """The same trajectories as a grid of Tune."""
    kinds = [stage.kind for stage in planned_stages(plan.trajectories[0]) if stage.kind in DEVICES]
    held = tune.PlacementGroupFactory([{DEVICE: max(DEVICES.values())}])
    trainable = tune.with_parameters(plain_trial, times=times, kinds=kinds, notes=str(notes))
    tune.Tuner(
        tune.with_resources(trainable, held),
        param_space={"trajectory": tune.grid_search([t.id for t in plan.trajectories])},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(name="plain", storage_path=str(scratch), verbose=0),
    ).fit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=200)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--concurrent", type=int, help="trajectories at a time; by default as in a campaign")
    parser.add_argument("--minutes", type=float, default=8.0, help="time of the distinct work on all GPUs")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain grid out")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="iterabre-scheduling-"))
    config = campaign(scratch, arguments.trajectories)
    requests = {kind: ResourceRequest(ResourceBundle(0, devices)) for kind, devices in DEVICES.items()}
    nodes = [
        Node(f"node {number}", gpus=GPUS_OF_A_NODE) for number in range(arguments.gpus // GPUS_OF_A_NODE)
    ]
    admission = AdmissionController(partial(list, nodes), requests)
    concurrent = arguments.concurrent or admission.concurrent_trajectories(nodes)
    plan = build_plan(config)
    times = stage_times()
    planned = [stage for stages in campaign_stages(plan).values() for stage in stages]
    distinct = distinct_stages(planned)
    work_s = sum(times.get(kind, 0) * DEVICES.get(kind, 0) for kind, _ in distinct)
    scale = arguments.minutes * 60 * arguments.gpus / work_s
    times = {kind: scale * time_s for kind, time_s in times.items()}
    print(f"stages: {count_stages(planned)}")
    print(
        f"seconds a stage, {scale:.1%} of a real one: "
        + ", ".join(f"{kind} {time_s:.2f}" for kind, time_s in times.items())
    )

    ray.init(
        address="local",
        num_cpus=4,
        resources={DEVICE: arguments.gpus},
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={"num_workers_soft_limit": arguments.gpus + concurrent},
    )
    start_processes(arguments.gpus)
    notes = {name: scratch / name for name in ("few", "ours", "plain")}
    for directory in notes.values():
        directory.mkdir()
    without_overlap = campaign(scratch, FEW, overlap=False)
    gaps = sorted(
        overheads(run_ours(without_overlap, build_plan(without_overlap), times, notes["few"], admission))
    )
    print(
        f"between stages: median {statistics.median(gaps) * 1e3:.0f} ms, "
        f"mean {statistics.mean(gaps) * 1e3:.0f} ms, 95 % below {gaps[int(len(gaps) * 0.95)] * 1e3:.0f} ms"
    )
    started = time.monotonic()
    work = run_ours(config, plan, times, notes["ours"], admission, concurrent)
    wall_s, (first, last) = time.monotonic() - started, whole(work)
    print(
        f"ours:  {len(work)} stages computed, {last - first:.0f} s from first to last "
        f"({wall_s:.0f} s with start and end), "
        f"GPUs at work {utilisation(work, arguments.gpus, whole(work)):.1%}"
    )
    print(
        f"       {utilisation(work, arguments.gpus, full(work)):.1%} while {concurrent} trajectories were "
        f"under way; driver's memory {psutil.Process().memory_info().rss / 2**20:.0f} MiB"
    )
    if not arguments.no_plain:
        run_plain(plan, times, notes["plain"], scratch)
        work = read_notes(notes["plain"])
        first, last = whole(work)
        print(
            f"plain: {len(work)} stages computed, {last - first:.0f} s from first to last, "
            f"GPUs at work {utilisation(work, arguments.gpus, whole(work)):.1%}"
        )
    ray.shutdown()


if __name__ == "__main__":
    main()
