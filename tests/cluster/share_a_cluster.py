"""Two drivers, each with a campaign of its own, on one cluster of two CPUs; every stage holds one CPU.

    python -m tests.cluster.share_a_cluster DIRECTORY
Prints where the actors of both are that belong on the head, how each campaign ended, when each stage was at
work, and how long at most a CPU was idle while stages waited.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import ray
from ray._private import state

from orchestrator.config import parse_config
from orchestrator.execution.campaign import limits_of
from orchestrator.execution.cluster import ClusterNodes, cluster, node_types
from orchestrator.execution.tune import run_trials
from orchestrator.planning.planner import build_plan
from orchestrator.scheduling.admission import AdmissionController
from orchestrator.scheduling.resources import stage_resources
from orchestrator.storage.stage_store import Store
from tests.chaos.nodes import LocalCluster, adopt_orphans
from tests.support.simulated import Simulation
from tests.support.tiny_campaign import tiny_campaign

DRIVERS = ("first", "second")
SECONDS = {"score": 4.0, "recover": 6.0, "evaluate": 3.0, "export": 2.0}
TRAJECTORIES = 2
ON_HEAD = ("HeadCoordinator", "Coordinator", "ProgressBoard")
CPUS = 2


def drive(address: str, directory: Path, name: str) -> None:
    """Run a campaign and print how it ended."""
    raw = tiny_campaign(directory)
    raw["name"] = name
    raw["methods"][0]["recovery"]["learning_rate"] = {"grid": [0.1, 0.2]}
    raw["execution"] = {"backend": "ray", "scoring": {"actors": 1}}
    config = parse_config(raw, name)
    notes = directory / f"notes-{name}"
    notes.mkdir()
    with cluster(address):
        nodes = ClusterNodes(node_types(config.execution))
        admission = AdmissionController(nodes, stage_resources(config.execution))
        outcome = run_trials(
            config,
            build_plan(config),
            Store.of_campaign(raw["storage"]["path"], name),
            limits_of(config),
            TRAJECTORIES,
            admission,
            Simulation(SECONDS, notes, cpus=1),
        )
    print(json.dumps({"driver": name, "failures": dict(outcome.failures)}))


def places_of_head_actors() -> list[str]:
    """Where the drivers' coordinators and boards are, as soon as all are up."""
    while True:
        found = [
            a for a in state.actors().values() if a["ActorClassName"] in ON_HEAD and a["State"] == "ALIVE"
        ]
        if len(found) == 2 * len(DRIVERS):
            head = next(node["NodeID"] for node in ray.nodes() if not node["Resources"].get("CPU"))
            return ["head" if actor["Address"]["NodeID"] == head else "worker" for actor in found]
        time.sleep(0.2)


def timeline(directory: Path) -> list[tuple[float, float, str, str]]:
    """When each stage began and ended its work, of which driver and kind; from the first beginning on."""
    stages = []
    for file in directory.glob("notes-*/*.txt"):
        _, _, done, took = file.read_text().split()
        stages.append((float(done) - float(took), float(done), file.parent.name[6:], file.name.split("-")[0]))
    first = min(stages)[0]
    return sorted((begin - first, end - first, driver, kind) for begin, end, driver, kind in stages)


def longest_idle_s(stages: list[tuple[float, float, str, str]]) -> float:
    """The longest time in which a CPU was free, up to when each driver had but one stage left."""
    last = min(sorted(s[1] for s in stages if s[2] == driver)[-2] for driver in DRIVERS)
    changes = sorted([(begin, 1) for begin, *_ in stages] + [(end, -1) for _, end, *_ in stages])
    at_work, since, longest = 0, 0.0, 0.0
    for when, change in changes:
        if when > last:
            break
        if at_work < CPUS:
            longest = max(longest, when - since)
        else:
            since = when
        at_work += change
        since = when if at_work >= CPUS else since
    return longest


def main() -> None:
    directory = Path(sys.argv[1])
    if len(sys.argv) > 2:
        drive(sys.argv[2], directory, sys.argv[3])
        return
    adopt_orphans()
    tiny_campaign(directory)
    shared = LocalCluster(workers=CPUS)
    drivers = [
        subprocess.Popen([sys.executable, "-m", __spec__.name, str(directory), shared.address, name])
        for name in DRIVERS
    ]
    ray.init(address=shared.address, log_to_driver=False)
    print("coordinators and boards:", *places_of_head_actors(), flush=True)
    for driver in drivers:
        driver.wait()
    ray.shutdown()
    shared.stop()
    stages = timeline(directory)
    for begin, end, name, kind in stages:
        line = " " * round(begin / 3) + "#" * max(1, round((end - begin) / 3))
        print(f"{name:7} {kind:9} {begin:6.1f} to {end:6.1f} s  {line}")
    print(f"a CPU was idle for {longest_idle_s(stages):.1f} s at most")
    shared.forget()


if __name__ == "__main__":
    main()
