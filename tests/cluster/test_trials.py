"""Trials of one campaign side by side: single flight, early stopping, limits. Stages only sleep."""

import itertools
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.config import CampaignConfig, parse_config
from orchestrator.execution.campaign import limits_of
from orchestrator.execution.cluster import ClusterNodes
from orchestrator.execution.coordinator_client import RayCoordinatorClient
from orchestrator.execution.head_actors import start_coordinator
from orchestrator.execution.tune import CampaignOutcome, run_trials
from orchestrator.planning.planner import build_plan
from orchestrator.scheduling.admission import AdmissionController
from orchestrator.scheduling.coordinator import LEASE_S, SETTLE_S
from orchestrator.scheduling.leases import Leases
from orchestrator.scheduling.limits import Limits
from orchestrator.scheduling.packing import Node
from orchestrator.scheduling.resources import ResourceBundle, ResourceRequest
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import read_statuses
from tests.cluster.exported import exported
from tests.support.simulated import SimulatedBackend, Simulation
from tests.support.tiny_campaign import tiny_campaign

SECONDS = {"score": 1.5, "recover": 0.1, "evaluate": 0.1, "export": 0.0}
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trials")
    tiny_campaign(directory)
    return directory


def _run(
    place: Path,
    tmp_path: Path,
    change: Change,
    admission: AdmissionController | None = None,
    simulation: type[Simulation] = Simulation,
) -> tuple[CampaignOutcome, CampaignConfig, Store]:
    campaign = tiny_campaign(place)
    campaign["execution"] |= {"backend": "ray"}
    campaign["storage"]["path"] = str(tmp_path / "runs")
    change(campaign)
    config = parse_config(campaign, "campaign.yaml")
    store = Store.of_campaign(config.storage.path, config.name)
    notes = tmp_path / "notes"
    notes.mkdir(exist_ok=True)
    at_a_time = config.execution.max_concurrent_trajectories or 3
    outcome = run_trials(
        config,
        build_plan(config),
        store,
        limits_of(config),
        at_a_time,
        admission,
        make_backend=simulation(SECONDS, notes),
    )
    return outcome, config, store


def _computed(tmp_path: Path, kind: str) -> int:
    return len(list((tmp_path / "notes").glob(f"{kind}-*.txt")))


def _rates(*rates: float, **search: Any) -> Change:
    def change(campaign: dict[str, Any]) -> None:
        campaign["methods"][0]["recovery"]["learning_rate"] = {"grid": list(rates)}
        campaign["search"] = search

    return change


def test_no_more_stages_at_a_time_than_there_is_room_for(
    ray_two_cpus: None, place: Path, tmp_path: Path
) -> None:
    two = AdmissionController(
        lambda: [Node("n", 2)], dict.fromkeys(SECONDS, ResourceRequest(ResourceBundle(1)))
    )
    outcome, _, _ = _run(place, tmp_path, _rates(0.1, 0.2, 0.3), two)
    assert outcome == CampaignOutcome({})
    notes = [file.read_text().split() for file in (tmp_path / "notes").glob("*.txt")]
    ends = [(float(done), -1) for _, _, done, _ in notes]
    starts = [(float(done) - float(took), 1) for _, _, done, took in notes]
    at_work = list(itertools.accumulate(change for _, change in sorted(starts + ends)))
    assert max(at_work) == 2


class Holding:
    """An actor of this job, which holds what it asked for from the time when it is made."""

    def __init__(self, seconds: float):
        time.sleep(seconds)


def test_what_this_job_holds_is_not_taken_for_others(ray_two_cpus: None) -> None:
    nodes = ClusterNodes([(Node("may start", 4, 1, is_up=False), 2)])
    (node, *more) = nodes()
    assert (node.cpus, node.others[0], node.ours[0], len(more)) == (2, 0, 0, 2)
    held = ray.remote(num_cpus=1)(Holding).remote(3.0)  # being made for three seconds
    bundles = ray.util.placement_group([{"CPU": 0.5}])
    in_bundle = PlacementGroupSchedulingStrategy(bundles)
    grouped = ray.remote(num_cpus=0.5, scheduling_strategy=in_bundle)(Holding).remote(0.0)
    waits = ray.remote(num_cpus=2)(Holding).remote(0.0)
    try:
        for _ in range(6):
            time.sleep(1)
            assert nodes()[0].others[0] == 0
        assert nodes()[0].ours[0] == 1.5
    finally:
        for actor in (held, grouped, waits):
            ray.kill(actor)
        ray.util.remove_placement_group(bundles)


def test_a_stage_that_three_trials_need_is_computed_once(
    ray_two_cpus: None, place: Path, tmp_path: Path
) -> None:
    outcome, config, store = _run(place, tmp_path, _rates(0.1, 0.2, 0.3))
    assert outcome == CampaignOutcome({})
    # Shared: the dense model, the first scores, and the evaluation of the first choice.
    assert _computed(tmp_path, "score") == 1 + 3
    assert _computed(tmp_path, "evaluate") == 2 + 3 * 3
    assert _computed(tmp_path, "recover") == 3 * 2
    table = Ledger(store.ledger_uri).read()
    scored = table.filter(pc.and_(pc.equal(table["stage"], "score"), pc.equal(table["metric"], "seconds")))
    assert scored.num_rows == 3 * 2
    assert len(set(scored["key"].to_pylist())) == 4
    trajectories = [f"llama--{method.name}--seed0" for method in config.methods]
    assert {name: o.state for name, o in read_statuses(store).items()} == dict.fromkeys(trajectories, "done")
    for name in trajectories:
        gauges = exported(config.name, f"ray_iterabre_token_perplexity {name} fox")
        assert gauges[f"ray_iterabre_token_perplexity {name} fox"] >= 10
        assert gauges[f"ray_iterabre_stages_total {name}"] == 13


@pytest.mark.long
def test_asha_gives_up_the_worst_between_iterations(ray_two_cpus: None, place: Path, tmp_path: Path) -> None:
    change = _rates(0.1, 0.2, 0.9, scheduler="asha", metric="fox/token_perplexity", reduction_factor=2)

    def one_at_a_time(campaign: dict[str, Any]) -> None:
        change(campaign)
        campaign["execution"]["max_concurrent_trajectories"] = 1

    outcome, _, store = _run(place, tmp_path, one_at_a_time)
    worst = "llama--iterabre--learning_rate=0.9--seed0"
    assert not outcome.failures
    assert worst in outcome.stopped
    assert read_statuses(store)[worst].reason.startswith("given up by the scheduler after iteration 1: fox/")
    assert read_statuses(store)["llama--iterabre--learning_rate=0.1--seed0"].state == "done"
    # Its first target was reached before it was given up, and it is not taken up again.
    assert (Path(store.uri) / f"models/{worst}/3-layers/config.json").is_file()
    computed = _computed(tmp_path, "recover")
    _run(place, tmp_path, one_at_a_time)
    assert _computed(tmp_path, "recover") == computed


def test_a_search_that_is_finished_stays_as_it_ended(ray_two_cpus: None, place: Path, tmp_path: Path) -> None:
    """Run without a scheduler first: both are done, whatever a scheduler would have said."""
    rates = _rates(0.1, 0.9, scheduler="none")
    search = _rates(0.1, 0.9, scheduler="asha", metric="fox/token_perplexity", reduction_factor=2)

    def one_at_a_time(campaign: dict[str, Any]) -> None:
        search(campaign)
        campaign["execution"]["max_concurrent_trajectories"] = 1

    _run(place, tmp_path, rates)
    _, _, store = _run(place, tmp_path, one_at_a_time)
    assert [status.state for status in read_statuses(store).values()] == ["done", "done"]


class Failing(Simulation):
    """A simulation whose evaluation raises ValueError in a task, and leaves a note each time."""

    def __call__(self, *_: Any) -> SimulatedBackend:
        return FailingBackend(self)


class FailingBackend(SimulatedBackend):
    def evaluate(self, spec: Any, uri: str, key: str, progress: Any) -> Any:
        self._work("evaluate", spec)
        (self._simulation.notes / f"failed-{key}-{uuid.uuid4().hex}").touch()
        task = ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")(_fail)
        return ray.get(task.remote())


def _fail() -> None:
    raise ValueError("no such thing")


def test_no_evaluation_that_raises_runs_twice(ray_two_cpus: None, place: Path, tmp_path: Path) -> None:
    outcome, _, store = _run(place, tmp_path, lambda campaign: None, simulation=Failing)
    (reason,) = outcome.failures.values()
    assert "ValueError: no such thing" in reason
    assert [status.state for status in read_statuses(store).values()] == ["failed"]
    keys = [file.name.split("-")[1] for file in (tmp_path / "notes").glob("failed-*")]
    # At the end of a trajectory two may have begun before the first of them fails.
    assert 1 <= len(keys) == len(set(keys)) <= 2


class Asking:
    """A process that leases a stage and then does nothing; a thread renews its lease."""

    def acquire(self, coordinator: Any) -> bool:
        Leases(RayCoordinatorClient(coordinator)).acquire("score", "key")
        return True


@pytest.mark.long
def test_a_killed_holders_lease_is_taken_over(ray_two_cpus: None, tmp_path: Path) -> None:
    coordinator = start_coordinator(Limits(), None, Store(str(tmp_path)), 1)._actor
    asking = ray.remote(num_cpus=0)(Asking)
    first, second = asking.remote(), asking.remote()
    assert ray.get(first.acquire.remote(coordinator))
    waiting = second.acquire.remote(coordinator)
    # As long as the first lives, the second waits, longer than a lease.
    assert ray.wait([waiting], timeout=LEASE_S + 5) == ([], [waiting])
    ray.kill(first)
    assert ray.get(waiting, timeout=2 * LEASE_S)
    ray.kill(second)
    ray.kill(coordinator)


@pytest.mark.long
def test_a_coordinator_that_is_killed_grants_nothing_that_is_held(ray_two_cpus: None, tmp_path: Path) -> None:
    coordinator = start_coordinator(Limits(), None, Store(str(tmp_path)), 1)._actor
    asking = ray.remote(num_cpus=0)(Asking)
    first, second = asking.remote(), asking.remote()
    assert ray.get(first.acquire.remote(coordinator))
    ray.kill(coordinator, no_restart=False)
    waiting = second.acquire.remote(coordinator)
    assert ray.wait([waiting], timeout=SETTLE_S + 10) == ([], [waiting])
    for actor in (first, second, coordinator):
        ray.kill(actor)
