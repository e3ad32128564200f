"""A search that is resumed: what has ended stays as it ended, and decisions come from the ledger."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.config import parse_config
from orchestrator.execution.dry_run import unfinished_trajectories
from orchestrator.execution.trial import run_trial
from orchestrator.execution.tune import LedgerStopper
from orchestrator.planning.plan import CampaignPlan
from orchestrator.planning.planner import build_plan
from orchestrator.scheduling.coordinator import Coordinator
from orchestrator.scheduling.limits import Limits
from orchestrator.storage.ledger import Ledger
from orchestrator.storage.stage_store import Store
from orchestrator.storage.trajectory_status import TrajectoryStatus, write_status
from tests.support.simulated import Simulation
from tests.support.tiny_campaign import tiny_campaign

KINDS = ("score", "recover", "evaluate", "export")
SEARCH = {"scheduler": "asha", "metric": "fox/token_perplexity", "reduction_factor": 2}


def plan_to(place: Path, targets: Sequence[int], rates: Sequence[float] = (0.1, 0.9)) -> CampaignPlan:
    raw = tiny_campaign(place) | {"search": SEARCH, "targets": [{"layers": target} for target in targets]}
    raw["execution"] |= {"backend": "ray"}
    raw["methods"][0]["recovery"]["learning_rate"] = {"grid": list(rates)}
    return build_plan(parse_config(raw, "campaign.yaml"))


def run(plan: CampaignPlan, store: Store, notes: Path) -> None:
    """Run every trajectory to its end, one after another, without a scheduler."""
    backend = Simulation(dict.fromkeys(KINDS, 0.0), notes)(None, None)  # type: ignore[arg-type]
    for trajectory in plan.trajectories:
        assert run_trial(trajectory, backend, store, lambda _: None, Coordinator(Limits())) is None


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def test_what_has_ended_stays_so_unless_it_grew(tmp_path: Path, store: Store) -> None:
    plan = plan_to(tmp_path, (3,))
    better, worse = (trajectory.id for trajectory in plan.trajectories)
    assert set(unfinished_trajectories(plan, store, keep_ends=True)) == {better, worse}
    run(plan, store, tmp_path)
    assert not unfinished_trajectories(plan, store, keep_ends=True)
    deeper = plan_to(tmp_path, (3, 2))
    assert set(unfinished_trajectories(deeper, store, keep_ends=True)) == {better, worse}
    write_status(store, worse, TrajectoryStatus("stopped", "given up"))
    assert [*unfinished_trajectories(deeper, store, keep_ends=True)] == [better]
    # Without a scheduler, what one has given up goes on.
    assert set(unfinished_trajectories(deeper, store)) == {better, worse}


def test_a_trajectory_that_reports_again_is_judged_as_before(tmp_path: Path, store: Store) -> None:
    plan = plan_to(tmp_path, (3, 2))
    run(plan, store, tmp_path)
    search = parse_config(
        tiny_campaign(tmp_path) | {"search": SEARCH, "execution": {"backend": "ray"}}, "campaign.yaml"
    ).search
    stopper = LedgerStopper(search, plan, Ledger(store.ledger_uri))
    for trajectory in plan.trajectories:
        for iteration in (1, 2):
            assert not stopper("trial", {"trajectory": trajectory.id, "iteration": iteration})
        assert not stopper("trial", {"failure": "", "ended": True})
    assert stopper.reasons == {}


def test_a_worse_trajectory_that_comes_later_is_given_up(tmp_path: Path, store: Store) -> None:
    shallow, plan = plan_to(tmp_path, (3,)), plan_to(tmp_path, (3, 2))
    run(shallow, store, tmp_path)
    search = parse_config(
        tiny_campaign(tmp_path) | {"search": SEARCH, "execution": {"backend": "ray"}}, "campaign.yaml"
    ).search
    stopper = LedgerStopper(search, plan, Ledger(store.ledger_uri))
    better, worse = (trajectory.id for trajectory in plan.trajectories)
    assert not stopper("trial", {"trajectory": better, "iteration": 1})
    assert stopper("trial", {"trajectory": worse, "iteration": 1})
    assert stopper.reasons[worse].startswith("fox/token_perplexity 101 after iteration 1 is not among")
