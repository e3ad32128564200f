"""Shared stages are found before anything runs, from the settings that lead to them."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import parse_config
from orchestrator.execution.dry_run import campaign_stages, planned_stages
from orchestrator.planning.plan import CampaignPlan
from orchestrator.planning.planner import build_plan
from orchestrator.planning.stages import StageCounts, count_stages
from tests.support.tiny_campaign import tiny_campaign


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharing")
    tiny_campaign(directory)
    return directory


def _plan(place: Path, *methods: dict[str, Any], **changes: Any) -> CampaignPlan:
    """A campaign of these methods, each the tiny one's with some sections changed."""
    campaign = tiny_campaign(place)
    base = campaign["methods"][0]
    campaign["methods"] = [
        {"name": f"m{i}", **{s: {**base.get(s, {}), **method.get(s, {})} for s in ("scoring", "recovery")}}
        | ({"schedule": method["schedule"]} if "schedule" in method else {})
        for i, method in enumerate(methods)
    ]
    return build_plan(parse_config(campaign | changes, "campaign.yaml"))


def _counts(plan: CampaignPlan) -> StageCounts:
    return count_stages(stage for stages in campaign_stages(plan).values() for stage in stages)


def _shared(plan: CampaignPlan) -> list[tuple[str, int, int]]:
    """Kind, iteration and depth of the stages that the first two trajectories share."""
    first, second = (planned_stages(trajectory) for trajectory in plan.trajectories[:2])
    keys = {(stage.kind, stage.key) for stage in second}
    return [(s.kind, s.iteration, s.layers) for s in first if (s.kind, s.key) in keys]


DENSE = ("evaluate", 0, 4)
FIRST_SCORE = ("score", 1, 4)
FIRST_PRUNE = [("prune", 1, 3), ("evaluate", 1, 3)]
ALL = [
    DENSE, FIRST_SCORE, *FIRST_PRUNE, ("recover", 1, 3), ("evaluate", 1, 3),
    ("score", 2, 3), ("prune", 2, 2), ("evaluate", 2, 2), ("recover", 2, 2), ("evaluate", 2, 2),
]  # fmt: skip
NO_RECOVERY = {"recovery": {"objective": "none"}}


@pytest.mark.parametrize(
    ("methods", "shared"),
    [
        # Equal in all but the name: everything but the exports.
        (({}, {}), ALL),
        # How it is computed is no difference.
        (({}, {"recovery": {"micro_batch_size": 2}}), ALL),
        # Different scores: the dense evaluation alone.
        (({}, {"scoring": {"criterion": "taylor"}}), [DENSE]),
        # Different recoveries: all up to the first one.
        (({}, {"recovery": {"learning_rate": 0.01}}), [DENSE, FIRST_SCORE, *FIRST_PRUNE]),
        (({}, NO_RECOVERY), [DENSE, FIRST_SCORE, *FIRST_PRUNE]),
    ],
)
def test_methods_share_what_their_settings_have_led_to(
    place: Path, methods: tuple[dict[str, Any], ...], shared: list[tuple[str, int, int]]
) -> None:
    assert _shared(_plan(place, *methods)) == shared


def test_another_portion_shares_the_scores_and_not_the_choice(place: Path) -> None:
    portions = ({}, {"schedule": {"layers_per_iteration": 2}})
    assert _shared(_plan(place, *portions, targets=[{"layers": 2}])) == [DENSE, FIRST_SCORE]


def test_seeds_share_what_is_not_drawn(place: Path) -> None:
    assert _shared(_plan(place, {}, seeds=[0, 1])) == [DENSE, FIRST_SCORE, *FIRST_PRUNE]
    random = {"scoring": {"criterion": "random"}}
    assert _shared(_plan(place, random, seeds=[0, 1])) == [DENSE]


def test_direct_targets_share_the_scores(place: Path) -> None:
    plan = _plan(place, {"schedule": {"mode": "direct"}})
    assert _shared(plan) == [DENSE, FIRST_SCORE]


def test_counts_of_a_small_grid_by_hand(place: Path) -> None:
    plan = _plan(place, {}, {"recovery": {"learning_rate": 0.01}}, seeds=[0, 1])
    counts = _counts(plan)
    # Each of 2 x 2 trajectories: dense, and twice score, prune, evaluate, recover, evaluate, export.
    assert counts.planned == 4 * 13
    # Shared by all four: dense evaluation, first score, first prune and its evaluation.
    assert counts.shared == 3 * 4
    assert counts.distinct == 4 * 13 - 12
    assert (counts.finished, counts.to_run) == (0, counts.distinct)


def test_stages_of_one_trajectory_are_all_its_own(place: Path) -> None:
    stages = planned_stages(_plan(place, {}).trajectories[0])
    assert len({(stage.kind, stage.key) for stage in stages}) == len(stages) == 13


def test_without_recovery_the_pruned_model_is_measured_once(place: Path) -> None:
    counts = _counts(_plan(place, NO_RECOVERY))
    assert (counts.planned, counts.shared) == (11, 2)
