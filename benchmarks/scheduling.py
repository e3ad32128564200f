"""A campaign of many trajectories whose stages only sleep, on made-up GPUs, against a plain grid of Ray Tune.

    python -m benchmarks.scheduling [--trajectories 200] [--gpus 64] [--minutes 2]

Stages sleep for times that the cost model gives for a 7B model on A100s, scaled so that
the campaign's distinct stages keep the GPUs busy for `--minutes`, with a log-normal spread.
All else is real: Tune, the coordinator, the store, the ledger. The plain grid is one trial a
trajectory that does the same stages in a row, shares none, and holds for its whole life as
many GPUs as its widest stage needs, as a Tune trial does.

Reported for both: time from the first stage to the last, share of the GPU time in which a
stage was at work, and for ours the time from the end of one stage to the next one's request
(key, store, ledger, coordinator) where no other trajectory can hold that up, and the driver's
memory. A sleeping stage is a process on this machine, which a real one would not be: those
are kept, and start before the clock does.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import tune

from actors.contracts import ModelInfo, ModelSpec
from orchestrator.campaign import limits_of, run_trials
from orchestrator.config import CampaignConfig, parse_config
from orchestrator.cost import MACHINES, START_S, StageCost, block_flops, seconds, training_block_flops
from orchestrator.plan import CampaignPlan
from orchestrator.planning import build_plan
from orchestrator.sharing import count_stages, distinct_stages, planned_stages
from orchestrator.store import Store
from tests.simulated import Simulation
from tests.tiny_campaign import tiny_campaign

DEVICE = "made_up_gpu"
DEVICES = {"score": 2, "recover": 4, "evaluate": 1, "export": 1}
SPREAD = 0.2
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
        for kind in START_S
    }


def campaign(directory: Path, trajectories: int, concurrent: int) -> CampaignConfig:
    """Trajectories that differ in learning rate and seed, 4 → 3 → 2 layers."""
    raw = tiny_campaign(directory)
    seeds = 4
    rates = [1e-4 * (1 + i) for i in range(max(1, trajectories // seeds))]
    raw["methods"][0]["recovery"]["learning_rate"] = {"grid": rates}
    raw["seeds"] = list(range(seeds))
    raw["execution"] = {"backend": "ray", "max_concurrent_trajectories": concurrent}
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


def utilisation(work: list[Work], gpus: int) -> tuple[float, float]:
    """Seconds from the first request to the last end, and the share of GPU time at work in them."""
    span = max(w.done for w in work) - min(w.asked for w in work)
    return span, sum(w.took * DEVICES[w.kind] for w in work) / (gpus * span)


def overheads(work: list[Work]) -> list[float]:
    """Seconds from the end of each stage to the next request of the same process.

    Between a recovery and the next export or scoring: what no other trajectory needs, so that
    nobody waits for another.
    """
    by_process: dict[str, list[Work]] = defaultdict(list)
    for w in sorted(work, key=lambda w: w.asked):
        by_process[w.process].append(w)
    return [
        after.asked - before.done
        for one in by_process.values()
        for before, after in itertools.pairwise(one)
        if (before.kind, after.kind) in OWN
    ]


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
    parser.add_argument("--concurrent", type=int, default=32, help="trajectories at a time")
    parser.add_argument("--minutes", type=float, default=2.0, help="time of the distinct work on all GPUs")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain grid out")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="iterabre-scheduling-"))
    config = campaign(scratch, arguments.trajectories, arguments.concurrent)
    plan = build_plan(config)
    times = stage_times()
    distinct = distinct_stages(s for t in plan.trajectories for s in planned_stages(t))
    work_s = sum(times.get(kind, 0) * DEVICES.get(kind, 0) for kind, _ in distinct)
    scale = arguments.minutes * 60 * arguments.gpus / work_s
    times = {kind: scale * time_s for kind, time_s in times.items()}
    print(f"stages: {count_stages(plan)}")
    print("seconds a stage: " + ", ".join(f"{kind} {time_s:.2f}" for kind, time_s in times.items()))

    ray.init(
        address="local",
        num_cpus=4,
        resources={DEVICE: arguments.gpus},
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"num_workers_soft_limit": arguments.gpus + arguments.concurrent},
    )
    start_processes(arguments.gpus)
    ours, plain = scratch / "ours", scratch / "plain"
    ours.mkdir()
    plain.mkdir()
    started = time.monotonic()
    backend = Simulation(times, ours, DEVICE, DEVICES, spread=SPREAD)
    outcome = run_trials(config, plan, Store(str(scratch / "run")), limits_of(config), make_backend=backend)
    assert not outcome.failures, outcome.failures
    wall_s = time.monotonic() - started
    work = read_notes(ours)
    span, share = utilisation(work, arguments.gpus)
    gaps = sorted(overheads(work))
    print(
        f"ours:  {len(work)} stages computed, {span:.0f} s from first to last "
        f"({wall_s:.0f} s with start and end), GPUs at work {share:.1%}"
    )
    print(
        f"       between stages: median {statistics.median(gaps) * 1e3:.0f} ms, "
        f"mean {statistics.mean(gaps) * 1e3:.0f} ms, 95 % below {gaps[int(len(gaps) * 0.95)] * 1e3:.0f} ms"
    )
    print(f"       driver's memory: {psutil.Process().memory_info().rss / 2**20:.0f} MiB")
    if not arguments.no_plain:
        run_plain(plan, times, plain, scratch)
        work = read_notes(plain)
        span, share = utilisation(work, arguments.gpus)
        print(
            f"plain: {len(work)} stages computed, {span:.0f} s from first to last, GPUs at work {share:.1%}"
        )
    ray.shutdown()


if __name__ == "__main__":
    main()
