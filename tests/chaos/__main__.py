"""Kills a random process of a small campaign at a random moment, resumes, and compares.

    python -m tests.chaos --runs 25 --seed 0 --directory DIR [--first 8]

The campaign runs on a cluster of a head and two workers of its own. A first run is
left alone: it shows what comes out, and when which processes live. Every further
one loses the process that its number and the seed decide, then the same command
runs again with --resume. DIR keeps the undisturbed run, so that the rest can be
done in pieces, and `kills.jsonl`. Exit code 1 if any run was not as it should be.

With --storage-faults nobody is killed: the campaign's storage is an S3-speaking server whose
calls fail at random, and the command, given once, has to end as undisturbed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from tests.chaos.audit import faults, manifests, repeats, starts
from tests.chaos.nodes import AGENTS, TITLES, LocalCluster, adopt_orphans, alive, at_work, environment
from tests.chaos.storage import BUCKET, download, faulty_storage
from tests.support.tiny_models import save_tiny

VICTIMS = ("driver", "trial", "score", "train", "evaluate", "raylet", "gcs_server")
TIMEOUT_S = 900
POLL_S = 0.1
NOBODY = "nobody"
DRAWS = 4
"""So many moments are tried: where all goes quicker than undisturbed, the last process may be gone."""
TEXT = "The gods and goddesses worshipped in the ancient land give rise to local manifestations .\n"

Moment = tuple[int, float]
"""So many finished stages, and seconds since the last of them."""


@dataclass(frozen=True)
class Kill:
    """One run: who was killed when, how long it all took, and what was wrong afterwards."""

    run: int
    victim: str
    moment: Moment
    title: str
    exit_code: int
    resumed: int
    repeated: int
    seconds: float
    faults: list[str]


def campaign(directory: Path, storage: Path, uri: str | None = None) -> Path:
    """A file of two trajectories, 5 → 3 layers, that share what they can: one with recovery, one without.

    It is stored at `uri`, if given, and else in `storage`.
    """
    text, model = directory / "text.txt", directory / "model"
    if not model.exists():
        save_tiny(model, num_layers=5)
        text.write_text(TEXT * 60)
    recovery = {
        "loss": {"attention": 0.0},
        "adapter": {"rank": 4},
        "data": {"path": str(text)},
        "sequence_length": 16,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_tokens": 512,
        "checkpoint_steps": 2,
    }
    config = {
        "name": "chaos",
        "models": [{"id": "tiny", "path": str(model)}],
        "methods": [
            {"name": "healed", "recovery": recovery, "schedule": {"recover_at": "targets"}},
            {"name": "bare", "recovery": {"objective": "none"}, "schedule": {"mode": "direct"}},
        ],
        "targets": [{"layers": 3}],
        "evaluation": {
            "perplexity": [{"name": "text", "data": {"path": str(text)}, "context": 64}],
            "at": "targets",
            "also_before_recovery": False,
        },
        "execution": {
            "max_concurrent_trajectories": 2,
            "scoring": {"actors": 2, "cpus": 0.25},
            "training": {"workers": 2, "cpus": 0.25},
            "evaluation": {"cpus": 0.25},
        },
        "storage": {"path": uri or str(storage)},
    }
    file = storage.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return file


class Driver:
    """The command; what it prints goes to a file."""

    def __init__(self, file: Path, address: str):
        command = [sys.executable, "-m", "orchestrator.cli", "campaign", str(file), "--resume"]
        with file.with_suffix(".txt").open("ab") as output:
            self.process = subprocess.Popen(
                [*command, "--address", address], stdout=output, stderr=output, start_new_session=True
            )

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(timeout=TIMEOUT_S)


class Clock:
    """How far a run is, by its finished stages."""

    def __init__(self, run: Path):
        self._run, self._count, self._since = run, 0, time.monotonic()

    def now(self) -> Moment:
        count = len(manifests(self._run))
        if count != self._count:
            self._count, self._since = count, time.monotonic()
        return self._count, time.monotonic() - self._since


def undisturbed(directory: Path) -> dict[str, list[Moment]]:
    """Run once without a kill; the moments at which each victim could have been killed."""
    storage, seen = directory / "undisturbed", directory / "moments.json"
    if seen.is_file():
        return json.loads(seen.read_text())
    moments: dict[str, list[Moment]] = {victim: [] for victim in VICTIMS}
    cluster = LocalCluster()
    try:
        driver, clock = Driver(campaign(directory, storage), cluster.address), Clock(storage / "chaos")
        while driver.process.poll() is None:
            now = clock.now()
            for victim in VICTIMS:
                if victim not in TITLES or alive(victim):
                    moments[victim].append(now)
            time.sleep(POLL_S)
        assert driver.wait() == 0, storage.with_suffix(".txt").read_text()
    finally:
        cluster.stop()
    cluster.forget()
    assert all(moments.values()), f"never seen: {[v for v in VICTIMS if not moments[v]]}"
    seen.write_text(json.dumps(moments))
    return moments


def disturbed(directory: Path, number: int, victim: str, moment: Moment) -> Kill:
    """Run, kill `victim` at `moment`, resume, and audit."""
    storage, started = directory / f"run-{number:03d}", time.monotonic()
    shutil.rmtree(storage, ignore_errors=True)
    file = campaign(directory, storage)
    cluster = LocalCluster()
    clusters = [cluster]
    wrong: list[str] = []
    try:
        driver = Driver(file, cluster.address)
        title = _kill(cluster, driver, Clock(storage / "chaos"), victim, moment)
        if title is None:
            wrong.append("the campaign was over before anybody was killed")
        exit_code = driver.wait()
        if victim == "gcs_server":
            # A node whose head is gone may be ended by Ray amid its own end, and leave its agents.
            left = [line for line in cluster.stop() if not line.startswith(AGENTS)]
            wrong += [f"outlived the head: {line}" for line in left]
            cluster = LocalCluster()
            clusters.append(cluster)
        resumed = Driver(file, cluster.address).wait()
        wrong += [f"outlived the driver: {line}" for line in _still_at_work()]
    finally:
        wrong += [f"outlived the cluster: {line}" for line in cluster.stop()]
    begun = starts(each.directory for each in clusters)
    wrong += faults(storage / "chaos", directory / "undisturbed" / "chaos", begun)
    if resumed != 0:
        wrong.insert(0, f"--resume ended with {resumed}: see {file.with_suffix('.txt')}")
    if not wrong:
        for each in clusters:
            each.forget()
    seconds = time.monotonic() - started
    return Kill(number, victim, moment, title or NOBODY, exit_code, resumed, repeats(begun), seconds, wrong)


def on_faulty_storage(directory: Path, number: int, seed: int) -> Kill:
    """Run on storage whose calls fail, and audit."""
    storage, started = directory / f"faulty-{number:03d}", time.monotonic()
    uri = f"s3://{BUCKET}/run-{number:03d}"
    wrong: list[str] = []
    with faulty_storage(seed) as (clean, injected):
        cluster = LocalCluster()
        try:
            file = campaign(directory, storage, uri)
            exit_code = Driver(file, cluster.address).wait()
            wrong += [f"outlived the driver: {line}" for line in _still_at_work()]
        finally:
            wrong += [f"outlived the cluster: {line}" for line in cluster.stop()]
        download(clean, f"{uri}/chaos", storage / "chaos")
    begun = starts([cluster.directory])
    wrong += faults(storage / "chaos", directory / "undisturbed" / "chaos", begun)
    if exit_code != 0:
        wrong.insert(0, f"the command ended with {exit_code}: see {file.with_suffix('.txt')}")
    if not wrong:
        cluster.forget()
    title = ", ".join(f"{count} {fault}" for fault, count in sorted(injected.done.items()))
    title = f"{title} of {injected.calls} calls"
    seconds = time.monotonic() - started
    return Kill(number, "storage", (0, 0.0), title, exit_code, exit_code, repeats(begun), seconds, wrong)


def _kill(cluster: LocalCluster, driver: Driver, clock: Clock, victim: str, moment: Moment) -> str | None:
    """Kill the first process that plays `victim` once the run is as far as `moment`; its id and role.

    None if the campaign was over before there was one.
    """
    while driver.process.poll() is None:
        if clock.now() >= moment:
            pids = _candidates(cluster, driver, victim)
            if pids:
                os.kill(pids[0], signal.SIGKILL)
                return f"{victim} {pids[0]}"
        time.sleep(POLL_S)
    return None


def _candidates(cluster: LocalCluster, driver: Driver, victim: str) -> list[int]:
    if victim == "driver":
        return [driver.process.pid]
    return alive(victim) if victim in TITLES else [cluster.daemon(victim)]


def _still_at_work(patience_s: float = 30.0) -> list[str]:
    deadline = time.monotonic() + patience_s
    while (titles := at_work()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return titles


def order_of(seed: int) -> list[str]:
    """Who is killed in which run: all in turn, in an order of the seed's own."""
    return random.Random(seed).sample(VICTIMS, len(VICTIMS))


def line_of(kill: Kill) -> str:
    """One run as a line of the table."""
    verdict = "as undisturbed" if not kill.faults else "; ".join(kill.faults[:3])
    when = f"{kill.moment[0]:2d} stages + {kill.moment[1]:4.1f} s" if kill.victim != "storage" else kill.title
    return (
        f"{kill.run:3d}  {kill.victim:10}  {when}  exit {kill.exit_code:3d}  "
        f"begun again {kill.repeated}  {kill.seconds:5.0f} s  {verdict}"
    )


def _with_somebody_killed(
    directory: Path, number: int, seed: int, victim: str, moments: dict[str, list[Moment]]
) -> Kill:
    draw = random.Random(f"{seed}-{number}")
    for _ in range(DRAWS):
        count, offset = draw.choice(moments[victim])
        kill = disturbed(directory, number, victim, (count, offset))
        if kill.title != NOBODY:
            break
    return kill


def main() -> int:
    """Print a line for every run and how many were as they should be."""
    parser = argparse.ArgumentParser(description="Kill processes of a small campaign, resume, compare.")
    parser.add_argument("--runs", type=int, help="25, or 10 with --storage-faults")
    parser.add_argument("--storage-faults", action="store_true", help="kill nobody; have storage fail")
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path("runs/chaos"))
    asked = parser.parse_args()
    runs = asked.runs if asked.runs is not None else 10 if asked.storage_faults else 25
    directory = asked.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    os.environ |= environment(directory)
    adopt_orphans()
    # So that a run which is stopped ends its cluster, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    moments, order = undisturbed(directory), order_of(asked.seed)
    bad = 0
    for number in range(asked.first, asked.first + runs):
        if asked.storage_faults:
            kill = on_faulty_storage(directory, number, asked.seed * 1000 + number)
        else:
            kill = _with_somebody_killed(directory, number, asked.seed, order[number % len(order)], moments)
        with (directory / "kills.jsonl").open("a") as file:
            file.write(json.dumps(asdict(kill)) + "\n")
        print(line_of(kill), flush=True)
        bad += bool(kill.faults)
    print(f"{runs - bad} of {runs} as undisturbed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
